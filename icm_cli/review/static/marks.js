// Drawing of the hints, the pointer and the divider over the image.

import { boxCorners, drawArea, drawPaint, isBox, isPaint, isPoint, isPositive } from "./shapes.js";

export const COLOURS = { positive: "#3ddc72", negative: "#ff5548", keep: "#3ddc72", drop: "#ff5548", box: "#ffd24a" };
const PAINT_OPACITY = 0.4;
const POINT_RADIUS_PX = 8;
const CROSS_PX = 14;

/** Draw everything over the image. `editor` has the shapes and the state of the pointer. */
export class Marks {
  constructor(canvas, viewer) {
    this.canvas = canvas;
    this.viewer = viewer;
    this.context = canvas.getContext("2d");
    this.layer = document.createElement("canvas").getContext("2d");
  }

  draw({ shapes, isVisible, cursor, crosshair, brush }) {
    const { canvas, context, viewer } = this;
    if (canvas.width !== viewer.canvas.width || canvas.height !== viewer.canvas.height) {
      canvas.width = viewer.canvas.width;
      canvas.height = viewer.canvas.height;
    }
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (viewer.image === null) return;
    if (isVisible) this.drawShapes(shapes);
    if (viewer.isComparing) this.drawDivider();
    if (cursor !== null && brush !== null) this.drawBrush(cursor, brush);
    if (crosshair !== null) this.drawCrosshair(crosshair);
  }

  drawShapes(shapes) {
    const paint = shapes.filter(isPaint);
    if (paint.length > 0) for (const label of ["keep", "drop"]) this.drawLayer(paint, label);
    for (const shape of shapes) {
      if (isPaint(shape)) continue;
      if (isPoint(shape)) for (const point of shape.points) this.drawPoint(point, isPositive(shape));
      else if (isBox(shape)) this.drawBox(shape.points);
      else this.drawOtherArea(shape);
    }
  }

  drawLayer(paint, label) {
    this.drawTinted(COLOURS[label], (layer) => drawPaint(layer, paint, label));
  }

  drawOtherArea(shape) {
    this.drawTinted(isPositive(shape) ? COLOURS.positive : COLOURS.negative, (layer) => drawArea(layer, shape));
  }

  /** Draw with one colour, however often the drawing covers a pixel. */
  drawTinted(colour, paint) {
    const { canvas, layer, viewer } = this;
    layer.canvas.width = canvas.width; // also clears
    layer.canvas.height = canvas.height;
    const [left, top] = viewer.toCanvas([0, 0]);
    layer.setTransform(viewer.zoom, 0, 0, viewer.zoom, left, top);
    layer.fillStyle = layer.strokeStyle = "#fff";
    paint(layer);
    layer.setTransform(1, 0, 0, 1, 0, 0);
    layer.globalCompositeOperation = "source-in";
    layer.fillStyle = colour;
    layer.fillRect(0, 0, canvas.width, canvas.height);
    layer.globalCompositeOperation = "source-over";
    this.context.globalAlpha = PAINT_OPACITY;
    this.context.drawImage(layer.canvas, 0, 0);
    this.context.globalAlpha = 1;
  }

  drawPoint(point, isOn) {
    const { context, viewer } = this;
    const [x, y] = viewer.toCanvas(point);
    const radius = POINT_RADIUS_PX * viewer.ratio;
    context.beginPath();
    context.arc(x, y, radius, 0, 2 * Math.PI);
    context.fillStyle = isOn ? COLOURS.positive : COLOURS.negative;
    context.fill();
    this.outline(1.5, "#000");
    context.beginPath();
    context.moveTo(x - radius / 2, y);
    context.lineTo(x + radius / 2, y);
    if (isOn) {
      context.moveTo(x, y - radius / 2);
      context.lineTo(x, y + radius / 2);
    }
    this.outline(2, "#000");
  }

  drawBox(points) {
    const [left, top, right, bottom] = boxCorners(points);
    const [start, end] = [this.viewer.toCanvas([left, top]), this.viewer.toCanvas([right, bottom])];
    this.context.beginPath();
    this.context.rect(...start, end[0] - start[0], end[1] - start[1]);
    this.outline(4, "#000a");
    this.outline(2, COLOURS.box);
  }

  drawBrush(cursor, { radius, colour }) {
    const [x, y] = this.viewer.toCanvas(cursor);
    this.context.beginPath();
    this.context.arc(x, y, Math.max(1, radius * this.viewer.zoom), 0, 2 * Math.PI);
    this.outline(3, "#000a");
    this.outline(1.5, colour);
  }

  drawCrosshair(point) {
    const [x, y] = this.viewer.toCanvas(point);
    const size = CROSS_PX * this.viewer.ratio;
    this.context.beginPath();
    this.context.moveTo(x - size, y);
    this.context.lineTo(x + size, y);
    this.context.moveTo(x, y - size);
    this.context.lineTo(x, y + size);
    this.outline(4, "#000");
    this.outline(1.5, "#fff");
  }

  drawDivider() {
    const { context, canvas, viewer } = this;
    const x = Math.round(viewer.division * canvas.width);
    context.beginPath();
    context.moveTo(x, 0);
    context.lineTo(x, canvas.height);
    this.outline(3, "#000a");
    this.outline(1, "#fff");
    context.beginPath();
    context.arc(x, canvas.height / 2, 9 * viewer.ratio, 0, 2 * Math.PI);
    context.fillStyle = "#fff";
    context.fill();
    this.outline(1, "#000");
  }

  outline(width, style) {
    this.context.lineWidth = width * this.viewer.ratio;
    this.context.strokeStyle = style;
    this.context.stroke();
  }
}
