// Tools on the image: points, box, brushes, panning, zooming, and the pointer that the keyboard moves.

import { byId, setText } from "./dom.js";
import { COLOURS, Marks } from "./marks.js";
import { notify } from "./messages.js";
import { boxCorners, coversPoint, isBox, isPoint, isPositive } from "./shapes.js";
import { store } from "./store.js";

const HIT_PX = 9;
const DIVIDER_PX = 8;
const ZOOM_STEP = 1.2;
const KEY_STEP_PX = 10;
const TOOL_HINTS = {
  point: "Click: object. Right-click or Alt-click: not the object. Drag a point to move it, click it to remove it.",
  box: "Drag a box around the object.",
  keep: "Paint what belongs to the object. Alpha is 1 there.",
  drop: "Paint what does not belong to it. Alpha is 0 there.",
  erase: "Paint over painted areas to remove them.",
  pan: "Drag the image. With other tools: middle button, or Space and drag.",
};
const BRUSHES = { keep: COLOURS.keep, drop: COLOURS.drop, erase: "#fff" };

export class Editor {
  tool = "point";
  draft = null;
  isVisible = true;
  isSpaceDown = false;
  /** Where the pointer is, and where the keyboard's one is, in pixels of the image; null: outside. */
  cursor = null;
  crosshair = null;
  /** The drag in progress: {move(point, event), end()}. */
  drag = null;

  /** `changed(isDragging)` is called when the hints of the draft have changed. */
  constructor(viewer, changed) {
    this.viewer = viewer;
    this.changed = changed;
    this.canvas = byId("marks");
    this.marks = new Marks(this.canvas, viewer);
    this.canvas.addEventListener("pointerdown", (event) => this.handleDown(event));
    this.canvas.addEventListener("pointermove", (event) => this.handleMove(event));
    this.canvas.addEventListener("pointerup", () => this.endDrag());
    this.canvas.addEventListener("pointercancel", () => this.endDrag());
    this.canvas.addEventListener("pointerleave", () => this.setCursor(null));
    this.canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    this.canvas.addEventListener("wheel", (event) => this.handleWheel(event), { passive: false });
    byId("brush-size").addEventListener("input", (event) => this.setBrush(Number(event.target.value)));
    this.setTool(this.tool);
    this.setBrush(store.settings.brush);
  }

  setDraft(draft) {
    this.draft = draft;
    this.drag = this.crosshair = null;
    this.draw();
  }

  setTool(tool) {
    this.tool = tool;
    for (const button of byId("tools").children) button.setAttribute("aria-pressed", button.dataset.tool === tool);
    setText(byId("tool-hint"), TOOL_HINTS[tool]);
    byId("brush-field").hidden = !(tool in BRUSHES);
    this.canvas.dataset.tool = tool;
    this.draw();
  }

  /** Set the radius of the brush in pixels of the image. */
  setBrush(radius) {
    const { min, max } = byId("brush-size");
    const value = Math.min(Number(max), Math.max(Number(min), Math.round(radius)));
    byId("brush-size").value = value;
    setText(byId("brush-value"), `${value} px`);
    if (value !== store.settings.brush) store.setSetting("brush", value);
    this.draw();
  }

  draw() {
    const brush = this.tool in BRUSHES ? { radius: store.settings.brush, colour: BRUSHES[this.tool] } : null;
    const { isVisible, cursor, crosshair } = this;
    this.marks.draw({ shapes: this.draft?.shapes ?? [], isVisible, cursor, crosshair, brush });
  }

  // ---- pointer

  handleDown(event) {
    if (this.draft === null || this.drag !== null) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.crosshair = null;
    const { viewer } = this;
    const isPan = event.button === 1 || this.isSpaceDown || (this.tool === "pan" && event.button === 0);
    const dividerPx = viewer.division * this.canvas.clientWidth;
    if (isPan) {
      event.preventDefault(); // no automatic scrolling
      this.drag = { move: (_, each) => viewer.panBy(each.movementX, each.movementY), end: () => {} };
    } else if (viewer.isComparing && Math.abs(event.offsetX - dividerPx) < DIVIDER_PX) {
      this.drag = { move: (_, each) => this.setDivision(each.offsetX / this.canvas.clientWidth), end: () => {} };
    } else if (event.button === 0 || (event.button === 2 && this.tool === "point")) {
      const isNegative = event.button === 2 || event.altKey || event.ctrlKey;
      this.press(viewer.toImage(event.offsetX, event.offsetY), isNegative);
    }
  }

  handleMove(event) {
    const point = this.viewer.toImage(event.offsetX, event.offsetY);
    this.drag?.move(point, event);
    this.setCursor(point);
  }

  handleWheel(event) {
    event.preventDefault();
    const steps = event.deltaMode === WheelEvent.DOM_DELTA_PIXEL ? event.deltaY / 100 : event.deltaY / 3;
    const speed = event.ctrlKey ? 4 : 1; // a pinch on a touchpad has small steps
    this.viewer.zoomTo(this.viewer.zoom * ZOOM_STEP ** (-steps * speed), event.offsetX, event.offsetY);
  }

  endDrag() {
    const { drag } = this;
    this.drag = null;
    drag?.end();
  }

  setDivision(division) {
    const value = Math.min(1, Math.max(0, division));
    byId("compare-position").value = 100 * value;
    this.viewer.set({ division: value });
  }

  setCursor(point) {
    this.cursor = point;
    this.showPixel(point);
    this.draw();
  }

  showPixel(point) {
    const values = point === null ? null : this.viewer.readPixel(...point);
    if (values === null) setText(byId("readout"), "");
    else {
      const [red, green, blue, alpha] = values;
      const position = point.map(Math.floor).join(", ");
      setText(byId("readout"), `x, y ${position}   RGB ${red} ${green} ${blue}   A ${alpha} (${(alpha / 255).toFixed(2)})`);
    }
  }

  // ---- keyboard

  /** Move the keyboard's pointer by steps of the screen. */
  moveCrosshair(x, y, stepPx = KEY_STEP_PX) {
    if (this.draft === null) return;
    const centre = this.viewer.toImage(this.canvas.clientWidth / 2, this.canvas.clientHeight / 2);
    const [oldX, oldY] = this.crosshair ?? centre;
    const step = (stepPx * this.viewer.ratio) / this.viewer.zoom;
    this.crosshair = this.clip(this.crosshair === null ? [oldX, oldY] : [oldX + x * step, oldY + y * step]);
    this.showPixel(this.crosshair);
    if (this.drag !== null) this.drag.move(this.crosshair);
    this.draw();
  }

  /** Use the tool at the keyboard's pointer. A box needs two presses: its corners. */
  pressCrosshair(isNegative) {
    if (this.crosshair === null || this.draft === null) return;
    const { crosshair } = this;
    if (this.drag !== null) this.endDrag();
    else {
      this.press(crosshair, isNegative);
      if (this.tool === "box") notify("Move the pointer to the opposite corner, and press Enter.");
      else this.endDrag();
    }
    this.crosshair = crosshair;
    this.draw();
  }

  // ---- tools

  /** Begin to use the tool at a point of the image. */
  press(point, isNegative) {
    if (this.tool === "point") this.pressPoint(point, isNegative);
    else if (this.tool === "box") this.pressBox(point);
    else if (this.tool in BRUSHES) this.pressBrush(point);
  }

  change(shapes, { isStep = true, isDragging = false } = {}) {
    this.draft.change(shapes, isStep);
    this.draw();
    this.changed(isDragging);
  }

  pressPoint(point, isNegative) {
    const hit = this.findPoint(point);
    if (hit !== undefined) {
      this.movePoint(hit, { isNew: false });
      return;
    }
    if (!this.isInside(point)) return;
    const [label, opposite] = isNegative ? ["bg", "keep"] : ["fg", "drop"];
    if (coversPoint(this.draft.shapes, opposite, point)) {
      notify(`This point is in an area that is painted as "${opposite}". Erase the paint first (E).`);
      return;
    }
    const shape = { label, shape_type: "point", points: [toPixelCentre(point)] };
    const shapes = isNegative ? this.draft.shapes : this.draft.shapes.map((each) => growBox(each, point));
    this.change([...shapes, shape], { isDragging: true });
    this.movePoint(shape, { isNew: true });
  }

  /** Begin to move a point. A point that was there and is not moved is removed. */
  movePoint(shape, { isNew }) {
    let current = shape;
    let isMoved = false;
    const start = shape.points[0];
    const move = (point) => {
      const distance = Math.hypot(point[0] - start[0], point[1] - start[1]) * this.viewer.zoom;
      if (!isMoved && distance < 4 * this.viewer.ratio) return;
      const moved = { ...current, points: [toPixelCentre(this.clip(point))] };
      const shapes = this.draft.shapes.map((each) => (each === current ? moved : each));
      this.change(shapes, { isStep: !isMoved && !isNew, isDragging: true });
      current = moved;
      isMoved = true;
    };
    const end = () => {
      if (!isNew && !isMoved) this.change(this.draft.shapes.filter((each) => each !== shape));
      else this.changed(false);
    };
    this.drag = { move, end };
  }

  findPoint(point) {
    const reach = (HIT_PX * this.viewer.ratio) / this.viewer.zoom;
    const isHit = ([x, y]) => Math.hypot(x - point[0], y - point[1]) <= reach;
    return this.isVisible ? this.draft.shapes.findLast((each) => each.shape_type === "point" && isHit(each.points[0])) : undefined;
  }

  pressBox(point) {
    const start = this.clip(point).map(Math.round);
    const before = this.draft.shapes;
    let isMoved = false;
    const move = (other) => {
      const end = this.clip(other).map(Math.round);
      if (start[0] === end[0] || start[1] === end[1]) return;
      const box = { label: "fg", shape_type: "rectangle", points: [start, end] };
      const others = before.filter((each) => !isBox(each) && !isOutside(each, box));
      this.change([box, ...others], { isStep: !isMoved, isDragging: true });
      isMoved = true;
    };
    this.drag = { move, end: () => isMoved && this.changed(false) };
  }

  pressBrush(point) {
    let stroke = { label: this.tool, shape_type: "brush", radius: store.settings.brush, points: [round(point)] };
    const opposite = { keep: "bg", drop: "fg" }[this.tool];
    const isCovered = (each, [x, y]) =>
      each.shape_type === "point" && each.label === opposite && Math.hypot(each.points[0][0] - x, each.points[0][1] - y) <= stroke.radius + 1;
    const paint = (target, isStep) => {
      const kept = this.draft.shapes.filter((each) => each !== stroke && !isCovered(each, target));
      const points = isStep ? stroke.points : [...stroke.points, round(target)];
      stroke = { ...stroke, points };
      this.draft.change([...kept, stroke], isStep);
      this.draw();
    };
    paint(point, true);
    this.drag = { move: (target) => paint(target, false), end: () => this.changed(false) };
  }

  isInside([x, y]) {
    return x >= 0 && y >= 0 && x < this.draft.width && y < this.draft.height;
  }

  clip([x, y]) {
    return [Math.min(this.draft.width, Math.max(0, x)), Math.min(this.draft.height, Math.max(0, y))];
  }
}

/** Return the centre of the pixel that contains a point; for a point on the last edge, of the last pixel. */
const toPixelCentre = (point) => point.map((value) => Math.max(0, Math.ceil(value) - 1) + 0.5);

const round = (point) => point.map((value) => Math.round(10 * value) / 10);

/** Return a box that also contains a point; other shapes as they are. */
function growBox(shape, [x, y]) {
  if (!isBox(shape)) return shape;
  const [left, top, right, bottom] = boxCorners(shape.points);
  const isContained = x >= left && x <= right && y >= top && y <= bottom;
  if (isContained) return shape;
  const points = [[Math.floor(Math.min(left, x)), Math.floor(Math.min(top, y))], [Math.ceil(Math.max(right, x)), Math.ceil(Math.max(bottom, y))]];
  return { ...shape, points };
}

/** Return whether a shape is a point on the object outside a box. */
function isOutside(shape, box) {
  if (!isPoint(shape) || !isPositive(shape)) return false;
  const [left, top, right, bottom] = boxCorners(box.points);
  return shape.points.some(([x, y]) => x < left || x > right || y < top || y > bottom);
}
