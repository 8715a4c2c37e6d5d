// Hints of an image: shapes as in hint files, and brush strokes, which become masks when they are sent.
//
// A stroke is {shape_type: "brush", label: "keep" | "drop" | "erase", radius, points}. The order of shapes counts: paint
// replaces the paint below it, so that areas to keep and to drop never overlap.

const LABELS = { bg: "bg", background: "bg", keep: "keep", drop: "drop" };
/** Least value of a pixel of paint, 0..255, that belongs to the mask. Above one half, two masks cannot share a pixel. */
const MIN_PAINT = 128;
/** Canvases of masks by their shape. */
const masks = new WeakMap();

/** Return shapes with the labels fg, bg, keep or drop, and decode their masks. */
export async function readShapes(hints) {
  const shapes = (hints?.shapes ?? []).map((shape) => ({
    ...shape,
    label: LABELS[shape.label.trim().toLowerCase()] ?? "fg",
    shape_type: shape.shape_type ?? "polygon",
  }));
  for (const shape of shapes) if (shape.shape_type === "mask") masks.set(shape, await decodeMask(shape.mask));
  return shapes;
}

/** Return whether a shape is an area whose final alpha is 1 or 0, or erases such areas. */
export const isPaint = (shape) =>
  shape.shape_type === "brush" || (["keep", "drop"].includes(shape.label) && !isPoint(shape));

export const isPoint = (shape) => shape.shape_type === "point" || shape.shape_type === "points";

/** Return whether a point shape is on the object. */
export const isPositive = (shape) => shape.label === "fg" || shape.label === "keep";

export const isBox = (shape) => shape.shape_type === "rectangle" && shape.label === "fg";

/** Return the hints as the server takes them: the strokes and areas of a label are one mask. */
export async function encodeShapes(shapes, width, height) {
  if (!shapes.some((shape) => shape.shape_type === "brush")) return { shapes };
  const encoded = shapes.filter((shape) => !isPaint(shape));
  for (const label of ["keep", "drop"]) {
    const mask = await encodePaint(shapes.filter(isPaint), label, width, height);
    if (mask !== null) encoded.push(mask);
  }
  return { shapes: encoded };
}

/** Draw what remains of the paint of a label, opaque, into an empty canvas in coordinates of the image. */
export function drawPaint(context, shapes, label) {
  for (const shape of shapes) {
    if (!isPaint(shape)) continue;
    context.globalCompositeOperation = shape.label === label ? "source-over" : "destination-out";
    drawArea(context, shape);
  }
  context.globalCompositeOperation = "source-over";
}

/** Draw a line or fill an area with the current style. */
export function drawArea(context, shape) {
  const { shape_type: type, points } = shape;
  if (type === "mask") {
    const [x, y] = boxCorners(points);
    context.drawImage(masks.get(shape), Math.floor(x), Math.floor(y));
    return;
  }
  context.beginPath();
  addPath(context, shape);
  if (type === "brush" || type === "line" || type === "linestrip") {
    context.lineWidth = type === "brush" ? 2 * shape.radius : 3;
    context.lineCap = context.lineJoin = "round";
    context.stroke();
  } else context.fill("evenodd");
}

/** Return whether the paint of a label covers a point. */
export function coversPoint(shapes, label, [x, y]) {
  const context = createContext(1, 1);
  context.translate(-Math.floor(x), -Math.floor(y));
  drawPaint(context, shapes, label);
  return context.getImageData(0, 0, 1, 1).data[3] >= MIN_PAINT;
}

/** Return left, top, right and bottom of points. */
export function boxCorners(points) {
  const [xs, ys] = [points.map(([x]) => x), points.map(([, y]) => y)];
  return [Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys)];
}

function addPath(context, { shape_type: type, points }) {
  const [[x, y], ...others] = points;
  if (type === "circle") {
    const [[edgeX, edgeY]] = others;
    context.arc(x, y, Math.hypot(edgeX - x, edgeY - y), 0, 2 * Math.PI);
  } else if (type === "rectangle") {
    const [left, top, right, bottom] = boxCorners(points);
    context.rect(left, top, right - left, bottom - top);
  } else {
    context.moveTo(x, y);
    for (const point of others.length > 0 ? others : [[x, y]]) context.lineTo(...point);
    if (type === "polygon") context.closePath();
  }
}

async function encodePaint(paint, label, width, height) {
  const parts = paint.filter((shape) => shape.label === label);
  if (parts.length === 0) return null;
  const [left, top, right, bottom] = boxCorners(parts.flatMap(outerCorners));
  const [x, y] = [Math.max(0, Math.floor(left)), Math.max(0, Math.floor(top))];
  const [columns, rows] = [Math.min(width, Math.ceil(right)) - x, Math.min(height, Math.ceil(bottom)) - y];
  if (columns <= 0 || rows <= 0) return null;
  const context = createContext(columns, rows);
  context.translate(-x, -y);
  drawPaint(context, paint, label);
  const pixels = context.getImageData(0, 0, columns, rows);
  let isEmpty = true;
  for (let at = 3; at < pixels.data.length; at += 4) {
    const isInside = pixels.data[at] >= MIN_PAINT;
    pixels.data[at] = isInside ? 255 : 0;
    isEmpty &&= !isInside;
  }
  if (isEmpty) return null;
  context.putImageData(pixels, 0, 0);
  const points = [[x, y], [x + columns - 1, y + rows - 1]];
  return { label, shape_type: "mask", points, mask: await toBase64(context.canvas) };
}

/** Return corners of a box that contains a shape. */
function outerCorners({ shape_type: type, points, radius = 3 }) {
  const [left, top, right, bottom] = boxCorners(points);
  const margin = type === "circle" ? Math.hypot(right - left, bottom - top) : radius + 1;
  return [[left - margin, top - margin], [right + margin, bottom + margin]];
}

/** Return a canvas that is opaque where the mask of a hint file is above 0, and transparent elsewhere. */
async function decodeMask(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const bitmap = await createImageBitmap(new Blob([bytes], { type: "image/png" }), { colorSpaceConversion: "none" });
  const context = createContext(bitmap.width, bitmap.height);
  context.drawImage(bitmap, 0, 0);
  const pixels = context.getImageData(0, 0, bitmap.width, bitmap.height);
  for (let at = 0; at < pixels.data.length; at += 4) pixels.data[at + 3] = pixels.data[at] > 0 ? 255 : 0;
  context.putImageData(pixels, 0, 0);
  return context.canvas;
}

function createContext(width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  return canvas.getContext("2d", { willReadFrequently: true });
}

async function toBase64(canvas) {
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  const bytes = new Uint8Array(await blob.arrayBuffer());
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return btoa(text);
}
