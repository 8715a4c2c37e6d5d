// Hints of an image: shapes as in hint files, and strokes, which become masks when they are sent. A stroke is
// {shape_type: "brush", label: "keep" | "drop" | "erase", radius, points}. It replaces the paint below it.
import { decodeImage } from "./api.js";
import { createCanvas } from "./viewer.js";

export const PAINT_LABELS = ["keep", "drop"];
/** Least value of a pixel of a mask, 0..255. Above one half, two masks cannot share a pixel. */
const MIN_PAINT = 128;
const LINE_PX = 3;
const masks = new WeakMap(); // canvases of masks by their shape

export const isPoint = ({ shape_type: type }) => type === "point" || type === "points";
export const isBox = ({ shape_type: type, label }) => type === "rectangle" && label === "fg";
/** Return whether a shape is on the object. */
export const isPositive = ({ label }) => label === "fg" || label === "keep";
const isBrush = ({ shape_type: type }) => type === "brush";
/** Return whether a shape is an area whose final alpha is 1 or 0, or erases such areas. */
export const isPaint = (shape) => isBrush(shape) || (PAINT_LABELS.includes(shape.label) && !isPoint(shape));

/** Return left, top, right and bottom of points. */
export function boxCorners(points) {
  const [xs, ys] = [points.map(([x]) => x), points.map(([, y]) => y)];
  return [Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys)];
}
/** Return the shapes of hints that the server sent, with the labels fg, bg, keep or drop, and decode their masks. */
export async function readShapes(hints) {
  const shapes = hints?.shapes ?? [];
  for (const shape of shapes) if (shape.shape_type === "mask") masks.set(shape, await decodeMask(shape.mask));
  return shapes;
}
/** Return the hints as the server takes them: the strokes and areas of a label are one mask. */
export async function encodeShapes(shapes, width, height) {
  if (!shapes.some(isBrush)) return { shapes };
  const paint = shapes.filter(isPaint);
  const areas = await Promise.all(PAINT_LABELS.map((label) => encodePaint(paint, label, width, height)));
  return { shapes: [...shapes.filter((shape) => !isPaint(shape)), ...areas.filter(Boolean)] };
}
/** Draw what remains of the paint of a label, opaque, into an empty canvas in coordinates of the image. */
export function drawPaint(context, shapes, label) {
  for (const shape of shapes.filter(isPaint)) {
    context.globalCompositeOperation = shape.label === label ? "source-over" : "destination-out";
    drawArea(context, shape);
  }
  context.globalCompositeOperation = "source-over";
}
/** Return whether a point of the image is in the paint of a label. */
export function isPainted(shapes, [x, y], label) {
  const context = createCanvas(1, 1, { willReadFrequently: true });
  context.translate(-Math.floor(x), -Math.floor(y));
  drawPaint(context, shapes, label);
  return context.getImageData(0, 0, 1, 1).data[3] >= MIN_PAINT;
}
/** Draw a line or fill an area with the current style. */
export function drawArea(context, shape) {
  const { shape_type: type, points, radius = LINE_PX / 2 } = shape;
  const [[x, y], edge] = points;
  const [left, top, right, bottom] = boxCorners(points);
  context.beginPath();
  if (type === "mask") context.drawImage(masks.get(shape), Math.floor(left), Math.floor(top));
  else if (type === "circle") context.arc(x, y, Math.hypot(edge[0] - x, edge[1] - y), 0, 2 * Math.PI);
  else if (type === "rectangle") context.rect(left, top, right - left, bottom - top);
  else {
    context.moveTo(x + (isBrush(shape) ? 0.01 : 0), y); // a line of length 0 would not be drawn
    for (const point of points) context.lineTo(...point);
  }
  if (isBrush(shape) || type === "line" || type === "linestrip") {
    context.lineWidth = 2 * radius;
    context.lineCap = context.lineJoin = "round";
    context.stroke();
  } else context.fill("evenodd");
}
/** Return the paint of a label as one mask; null: there is none. */
async function encodePaint(paint, label, width, height) {
  const corners = paint.filter((shape) => shape.label === label).flatMap(outerCorners);
  if (corners.length === 0) return null;
  const [left, top, right, bottom] = boxCorners(corners);
  const [x, y] = [Math.max(0, Math.floor(left)), Math.max(0, Math.floor(top))];
  const [columns, rows] = [Math.min(width, Math.ceil(right)) - x, Math.min(height, Math.ceil(bottom)) - y];
  if (columns <= 0 || rows <= 0) return null;
  const context = createCanvas(columns, rows, { willReadFrequently: true });
  context.translate(-x, -y);
  drawPaint(context, paint, label);
  const hasPixels = setOpaque(context, (data, at) => data[at + 3] >= MIN_PAINT);
  const points = [[x, y], [x + columns - 1, y + rows - 1]];
  const [, mask] = context.canvas.toDataURL("image/png").split(",");
  return hasPixels ? { label, shape_type: "mask", points, mask } : null;
}
/** Return corners of a box that contains a shape. */
function outerCorners({ shape_type: type, points, radius = LINE_PX }) {
  const [left, top, right, bottom] = boxCorners(points);
  const margin = type === "circle" ? Math.hypot(right - left, bottom - top) : radius + 1;
  return [[left - margin, top - margin], [right + margin, bottom + margin]];
}
/** Return a canvas that is opaque where the mask of a hint file is above 0, and transparent elsewhere. */
async function decodeMask(base64) {
  const png = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const bitmap = await decodeImage(new Blob([png], { type: "image/png" }));
  const context = createCanvas(bitmap.width, bitmap.height, { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  setOpaque(context, (data, at) => data[at] > 0);
  return context.canvas;
}
/** Make the pixels opaque where `isInside(data, at)`, and others transparent. Returns whether any is. */
function setOpaque(context, isInside) {
  const pixels = context.getImageData(0, 0, context.canvas.width, context.canvas.height);
  let isAny = false;
  for (let at = 0; at < pixels.data.length; at += 4) {
    const isOpaque = isInside(pixels.data, at);
    pixels.data[at + 3] = isOpaque ? 255 : 0;
    isAny ||= isOpaque;
  }
  context.putImageData(pixels, 0, 0);
  return isAny;
}
