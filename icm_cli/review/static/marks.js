// Drawing of the hints, the pointer and the divider over the image.
import { boxCorners, drawArea, drawPaint, isBox, isPaint, isPoint, isPositive } from "./shapes.js";

export const COLOURS = { positive: "#3ddc72", negative: "#ff5548", box: "#ffd24a", erase: "#fff" };
const SHADOW = "#000a";
const PAINT_OPACITY = 0.3;
const POINT_RADIUS_PX = 8;
const CROSS_PX = 14;

export class Marks {
  constructor(canvas, viewer) {
    Object.assign(this, { canvas, viewer, context: canvas.getContext("2d") });
    this.layer = document.createElement("canvas").getContext("2d");
  }
  /** Draw all. `cursor`, `crosshair`: points of the image or null; `brush`: {radius, colour} or null. */
  draw({ shapes, isVisible, cursor, crosshair, brush }) {
    const { canvas, context, viewer } = this;
    const { width, height } = viewer.canvas;
    for (const target of [canvas, this.layer.canvas]) {
      if (target.width !== width || target.height !== height) Object.assign(target, { width, height });
    }
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (viewer.image === null) return;
    if (isVisible) this.drawShapes(shapes);
    if (viewer.isComparing) this.drawDivider(Math.round(viewer.division * canvas.width));
    if (cursor !== null && brush !== null) this.drawBrush(viewer.toCanvas(cursor), brush);
    if (crosshair !== null) this.drawCrosshair(viewer.toCanvas(crosshair));
  }
  drawShapes(shapes) {
    if (shapes.some(isPaint)) {
      this.drawTinted(COLOURS.positive, (layer) => drawPaint(layer, shapes, "keep"));
      this.drawTinted(COLOURS.negative, (layer) => drawPaint(layer, shapes, "drop"));
    }
    for (const shape of shapes.filter((each) => !isPaint(each))) {
      const colour = isPositive(shape) ? COLOURS.positive : COLOURS.negative;
      if (isPoint(shape)) for (const point of shape.points) this.drawPoint(point, isPositive(shape), colour);
      else if (isBox(shape)) this.drawBox(boxCorners(shape.points));
      else this.drawTinted(colour, (layer) => drawArea(layer, shape));
    }
  }
  /** Draw with one colour and opacity, however often the drawing covers a pixel. */
  drawTinted(colour, draw) {
    const { canvas, layer, viewer } = this;
    layer.clearRect(0, 0, canvas.width, canvas.height);
    layer.setTransform(viewer.zoom, 0, 0, viewer.zoom, ...viewer.toCanvas([0, 0]));
    layer.fillStyle = layer.strokeStyle = "#fff";
    draw(layer);
    layer.resetTransform();
    layer.globalCompositeOperation = "source-in";
    layer.fillStyle = colour;
    layer.fillRect(0, 0, canvas.width, canvas.height);
    layer.globalCompositeOperation = "source-over";
    this.context.globalAlpha = PAINT_OPACITY;
    const [left, top] = viewer.toCanvas([0, 0]);
    const box = [left, top, viewer.image.width * viewer.zoom, viewer.image.height * viewer.zoom];
    this.context.drawImage(layer.canvas, ...box, ...box); // not outside of the image
    this.context.globalAlpha = 1;
  }
  drawPoint(point, hasPlus, colour) {
    const [x, y] = this.viewer.toCanvas(point);
    const radius = POINT_RADIUS_PX * this.viewer.ratio;
    this.drawDisc(x, y, radius, colour);
    const [across, down] = [[x - radius / 2, y, x + radius / 2, y], [x, y - radius / 2, x, y + radius / 2]];
    this.drawLines(hasPlus ? [across, down] : [across], [2, "#000"]);
  }
  drawBox([left, top, right, bottom]) {
    const [[x0, y0], [x1, y1]] = [this.viewer.toCanvas([left, top]), this.viewer.toCanvas([right, bottom])];
    this.context.beginPath();
    this.context.rect(x0, y0, x1 - x0, y1 - y0);
    this.stroke(4, SHADOW);
    this.stroke(2, COLOURS.box);
  }
  drawBrush([x, y], { radius, colour }) {
    this.context.beginPath();
    this.context.arc(x, y, Math.max(1, radius * this.viewer.zoom), 0, 2 * Math.PI);
    this.stroke(3, SHADOW);
    this.stroke(1.5, colour);
  }
  drawCrosshair([x, y]) {
    const size = CROSS_PX * this.viewer.ratio;
    this.drawLines([[x - size, y, x + size, y], [x, y - size, x, y + size]], [4, "#000"], [1.5, "#fff"]);
  }
  drawDivider(x) {
    this.drawLines([[x, 0, x, this.canvas.height]], [3, SHADOW], [1, "#fff"]);
    this.drawDisc(x, this.canvas.height / 2, 9 * this.viewer.ratio, "#fff");
  }
  drawDisc(x, y, radius, colour) {
    this.context.beginPath();
    this.context.arc(x, y, radius, 0, 2 * Math.PI);
    this.context.fillStyle = colour;
    this.context.fill();
    this.stroke(1.5, "#000");
  }
  /** Draw lines [x0, y0, x1, y1] once for each style [width, colour]. */
  drawLines(lines, ...styles) {
    this.context.beginPath();
    for (const [x0, y0, x1, y1] of lines) { this.context.moveTo(x0, y0); this.context.lineTo(x1, y1); }
    for (const style of styles) this.stroke(...style);
  }
  stroke(width, colour) {
    this.context.lineWidth = width * this.viewer.ratio;
    this.context.strokeStyle = colour;
    this.context.stroke();
  }
}
