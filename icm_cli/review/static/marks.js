// Drawing of the hints, the pointer and the divider over the image.
import { byId } from "./dom.js";
import { PAINT_LABELS, boxCorners, drawArea, drawPaint, isBox, isPaint, isPoint, isPositive } from "./shapes.js";
import { viewer } from "./viewer.js";

const [GREEN, BLUE] = ["#3ddc72", "#3d9dff"]; // unlike the red of the overlay, and unlike each other for all eyes
const COLOURS = { fg: GREEN, keep: GREEN, bg: BLUE, drop: BLUE, box: "#ffd24a", erase: "#fff" };
const SHADOW = "#000a";
const PAINT_OPACITY = 0.3;
const POINT_RADIUS_PX = 8;
const CROSS_PX = 14;
const canvas = byId("marks");
const context = canvas.getContext("2d");

/** Draw all. `cursor`, `crosshair`: points of the image or null; `brush`: {radius, label} or null. */
export function drawMarks({ shapes, isVisible, cursor, crosshair, brush }) {
  context.clearRect(0, 0, canvas.width, canvas.height);
  if (viewer.image === null) return;
  if (isVisible) drawShapes(shapes);
  if (viewer.isComparing) drawDivider(Math.round(viewer.division * canvas.width));
  if (cursor !== null && brush !== null) drawBrush(viewer.toCanvas(cursor), brush);
  if (crosshair !== null) drawCrosshair(viewer.toCanvas(crosshair));
}
function drawShapes(shapes) {
  const painted = shapes.some(isPaint) ? PAINT_LABELS : [];
  for (const label of painted) drawTinted(label, (layer) => drawPaint(layer, shapes, label));
  for (const shape of shapes.filter((each) => !isPaint(each))) {
    if (isPoint(shape)) for (const point of shape.points) drawPoint(point, shape);
    else if (isBox(shape)) drawBox(boxCorners(shape.points));
    else drawTinted(shape.label, (layer) => drawArea(layer, shape));
  }
}
/** Draw with the colour of a label and one opacity, however often the drawing covers a pixel. */
function drawTinted(label, draw) {
  const { layer, zoom, image } = viewer;
  const [left, top] = viewer.toCanvas([0, 0]);
  layer.clearRect(0, 0, canvas.width, canvas.height);
  layer.setTransform(zoom, 0, 0, zoom, left, top);
  layer.fillStyle = layer.strokeStyle = "#fff";
  layer.imageSmoothingEnabled = true;
  draw(layer);
  layer.resetTransform();
  layer.globalCompositeOperation = "source-in";
  layer.fillStyle = COLOURS[label];
  layer.fillRect(0, 0, canvas.width, canvas.height);
  layer.globalCompositeOperation = "source-over";
  context.globalAlpha = PAINT_OPACITY;
  const box = [left, top, image.width * zoom, image.height * zoom];
  context.drawImage(layer.canvas, ...box, ...box); // not outside of the image
  context.globalAlpha = 1;
}
function drawPoint(point, shape) {
  const [x, y] = viewer.toCanvas(point);
  const radius = POINT_RADIUS_PX * viewer.ratio;
  drawDisc(x, y, radius, COLOURS[shape.label]);
  const [across, down] = [[x - radius / 2, y, x + radius / 2, y], [x, y - radius / 2, x, y + radius / 2]];
  drawLines(isPositive(shape) ? [across, down] : [across], [2, "#000"]);
}
function drawBox([left, top, right, bottom]) {
  const [[x0, y0], [x1, y1]] = [viewer.toCanvas([left, top]), viewer.toCanvas([right, bottom])];
  const sides = [[x0, y0, x1, y0], [x1, y0, x1, y1], [x1, y1, x0, y1], [x0, y1, x0, y0]];
  drawLines(sides, [4, SHADOW], [2, COLOURS.box]);
}
function drawBrush([x, y], { radius, label }) {
  context.beginPath();
  context.arc(x, y, Math.max(1, radius * viewer.zoom), 0, 2 * Math.PI);
  stroke(3, SHADOW);
  stroke(1.5, COLOURS[label]);
}
function drawCrosshair([x, y]) {
  const size = CROSS_PX * viewer.ratio;
  drawLines([[x - size, y, x + size, y], [x, y - size, x, y + size]], [4, "#000"], [1.5, "#fff"]);
}
function drawDivider(x) {
  drawLines([[x, 0, x, canvas.height]], [3, SHADOW], [1, "#fff"]);
  drawDisc(x, canvas.height / 2, 9 * viewer.ratio, "#fff");
}
function drawDisc(x, y, radius, colour) {
  context.beginPath();
  context.arc(x, y, radius, 0, 2 * Math.PI);
  context.fillStyle = colour;
  context.fill();
  stroke(1.5, "#000");
}
/** Draw lines [x0, y0, x1, y1] once for each style [width, colour]. */
function drawLines(lines, ...styles) {
  context.beginPath();
  for (const [x0, y0, x1, y1] of lines) { context.moveTo(x0, y0); context.lineTo(x1, y1); }
  for (const style of styles) stroke(...style);
}
function stroke(width, colour) {
  context.lineWidth = width * viewer.ratio;
  context.strokeStyle = colour;
  context.stroke();
}
