// Tools on the image: points, box, brushes, moving and zooming, and a pointer that the keyboard moves.
import { byId, listen, pressButton, setText } from "./dom.js";
import { COLOURS, Marks } from "./marks.js";
import { notify } from "./messages.js";
import { boxCorners, isBox, isPainted, isPoint, isPositive } from "./shapes.js";
import { store } from "./store.js";

const HIT_PX = 9;
const DIVIDER_PX = 8;
const MOVE_PX = 4; // a point moves only if it is dragged further than this
const ZOOM_STEP = 1.2;
const KEY_STEP_PX = 10;
const BRUSHES = { keep: COLOURS.positive, drop: COLOURS.negative, erase: COLOURS.erase };
const OPPOSITES = { keep: "bg", drop: "fg" }; // label of paint -> label of the points that it replaces

export class Editor {
  tool = "point";
  draft = null;
  isVisible = true;
  isSpaceDown = false;
  /** Where the mouse is, and where the pointer of the keyboard is, in pixels of the image; null: nowhere. */
  cursor = null;
  crosshair = null;
  drag = null; // the drag in progress: {move(point of the image, event), end()}
  /** `changed(isDragging)` is called when the hints of the draft have changed. */
  constructor(viewer, changed) {
    Object.assign(this, { viewer, changed, canvas: byId("marks") });
    this.marks = new Marks(this.canvas, viewer);
    const handlers = {
      pointerdown: (event) => this.handleDown(event), pointermove: (event) => this.handleMove(event),
      pointerup: () => this.endDrag(), pointercancel: () => this.endDrag(),
      pointerleave: () => this.setCursor(null), wheel: (event) => this.handleWheel(event),
      contextmenu: (event) => event.preventDefault(),
    };
    listen(this.canvas, handlers, { passive: false });
    byId("brush-size").addEventListener("input", (event) => this.setBrush(Number(event.target.value)));
    this.setTool(this.tool);
    this.setBrush(store.settings.brush);
  }
  setDraft(draft) { Object.assign(this, { draft, drag: null, crosshair: null }); this.draw(); }
  setTool(tool) {
    this.tool = tool;
    pressButton("tools", "tool", tool);
    setText(byId("tool-hint"), byId("tools").querySelector(`[data-tool="${tool}"]`).title);
    byId("brush-field").hidden = !(tool in BRUSHES);
    this.canvas.dataset.tool = tool;
    this.draw();
  }
  /** Set the radius of the brush in pixels of the image. */
  setBrush(radius) {
    byId("brush-size").value = Math.round(radius); // within its limits
    const value = Number(byId("brush-size").value);
    setText(byId("brush-value"), `${value} px`);
    if (value !== store.settings.brush) store.setSetting("brush", value);
    this.draw();
  }
  setDivision(division) {
    byId("compare-position").value = 100 * division;
    this.viewer.set({ division: Math.min(1, Math.max(0, division)) });
  }
  setCursor(cursor) { this.cursor = cursor; this.draw(); }
  draw() {
    const brush = this.tool in BRUSHES ? { radius: store.settings.brush, colour: BRUSHES[this.tool] } : null;
    this.marks.draw({ ...this, shapes: this.draft?.shapes ?? [], brush });
    this.showPixel(this.crosshair ?? this.cursor);
  }
  showPixel(point) {
    const pixel = point && this.viewer.readPixel(...point);
    if (!pixel) return setText(byId("readout"), "");
    const [red, green, blue, alpha] = pixel;
    const position = point.map(Math.floor).join(", ");
    const value = `${alpha} (${(alpha / 255).toFixed(2)})`;
    setText(byId("readout"), `x, y ${position}   RGB ${red} ${green} ${blue}   A ${value}`);
  }
  handleDown(event) {
    if (this.draft === null || this.drag !== null) return;
    const { viewer, canvas } = this;
    const { button, offsetX, offsetY } = event;
    canvas.setPointerCapture(event.pointerId);
    this.crosshair = null;
    if (button === 1 || this.isSpaceDown || (this.tool === "pan" && button === 0)) {
      this.drag = { move: (_, { movementX, movementY }) => viewer.panBy(movementX, movementY), end() {} };
    } else if (viewer.isComparing && Math.abs(offsetX - viewer.division * canvas.clientWidth) < DIVIDER_PX) {
      this.drag = { move: (_, moved) => this.setDivision(moved.offsetX / canvas.clientWidth), end() {} };
    } else if (button === 0 || (button === 2 && this.tool === "point")) {
      this.press(viewer.toImage(offsetX, offsetY), button === 2 || event.altKey || event.ctrlKey);
    }
    if (button === 1) event.preventDefault(); // no automatic scrolling
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
  /** Move the pointer of the keyboard by steps of the screen. */
  moveCrosshair(x, y, stepPx = KEY_STEP_PX) {
    const { crosshair, draft } = this;
    if (draft === null) return;
    this.canvas.focus({ preventScroll: true }); // else Enter presses the button with the focus
    const step = (stepPx * this.viewer.ratio) / this.viewer.zoom;
    const centre = this.viewer.toImage(this.canvas.clientWidth / 2, this.canvas.clientHeight / 2);
    const target = crosshair === null ? centre : [crosshair[0] + x * step, crosshair[1] + y * step];
    this.crosshair = this.clip(target);
    this.drag?.move(this.crosshair);
    this.draw();
  }
  /** Use the tool at the pointer of the keyboard. A box needs two presses: its corners. */
  pressCrosshair(isNegative) {
    if (this.crosshair === null || this.draft === null) return;
    const isBoxStart = this.tool === "box" && this.drag === null;
    if (this.drag === null) this.press(this.crosshair, isNegative);
    if (isBoxStart) notify("Move the pointer to the opposite corner, and press Enter.");
    else this.endDrag();
  }
  /** Begin to use the tool at a point of the image. */
  press(point, isNegative) {
    if (this.tool in BRUSHES) this.pressBrush(point);
    else if (this.tool === "box") this.pressBox(this.clip(point).map(Math.round));
    else if (this.tool === "point") {
      const hit = this.findPoint(point);
      if (hit !== undefined) this.movePoint(hit, false);
      else if (this.isInside(point)) this.addPoint(point, isNegative);
    }
  }
  change(shapes, isStep = true) {
    this.draft.change(shapes, isStep);
    this.draw();
    this.changed(true);
  }
  addPoint(point, isNegative) {
    const { shapes } = this.draft;
    const [label, tool] = isNegative ? ["keep", "Keep"] : ["drop", "Drop"];
    const isRefused = isPainted(shapes, point, label);
    if (isRefused) return notify(`This is painted with ${tool}. Erase the paint first (E).`);
    const shape = { label: isNegative ? "bg" : "fg", shape_type: "point", points: [toPixelCentre(point)] };
    this.change([...(isNegative ? shapes : shapes.map((each) => growBox(each, point))), shape]);
    this.movePoint(shape, true);
  }
  /** Begin to move a point. If an old point is released where it was, that is a click, which removes it. */
  movePoint(shape, isNew) {
    let current = shape;
    const [[startX, startY]] = shape.points;
    const move = (point) => {
      const distance = Math.hypot(point[0] - startX, point[1] - startY) * this.viewer.zoom;
      if (current === shape && distance < MOVE_PX * this.viewer.ratio) return;
      const moved = { ...current, points: [toPixelCentre(this.clip(point))] };
      const shapes = this.draft.shapes.map((each) => (each === current ? moved : each));
      this.change(shapes, current === shape && !isNew);
      current = moved;
    };
    const end = () => {
      if (!isNew && current === shape) this.change(this.draft.shapes.filter((each) => each !== shape));
      this.changed(false);
    };
    this.drag = { move, end };
  }
  findPoint([x, y]) {
    const reach = (HIT_PX * this.viewer.ratio) / this.viewer.zoom;
    return this.draft.shapes.findLast((shape) => this.isVisible && isNear(shape, [x, y], reach));
  }
  /** Begin a box. It replaces the earlier box, and the points on the object that are outside it. */
  pressBox(start) {
    const before = this.draft.shapes;
    const move = (point) => {
      const end = this.clip(point).map(Math.round);
      if (start[0] === end[0] || start[1] === end[1]) return;
      const box = { label: "fg", shape_type: "rectangle", points: [start, end] };
      const isOutside = ({ points }) => !points.every((point) => contains(box, point));
      const isReplaced = (each) => isBox(each) || (isPoint(each) && isPositive(each) && isOutside(each));
      const others = before.filter((each) => !isReplaced(each));
      this.change([box, ...others], this.draft.shapes === before);
    };
    this.drag = { move, end: () => this.draft.shapes !== before && this.changed(false) };
  }
  /** Begin a stroke. It replaces points with the opposite label; the strokes below it stay in the list. */
  pressBrush(point) {
    const [label, radius] = [this.tool, store.settings.brush];
    let stroke = null;
    const paint = (target) => {
      const isOpposite = (each) => each.label === OPPOSITES[label] && isNear(each, target, radius + 1);
      const kept = this.draft.shapes.filter((each) => each !== stroke && !isOpposite(each));
      const isFirst = stroke === null;
      const points = [...(stroke?.points ?? []), target.map(roundTenth)];
      stroke = { label, shape_type: "brush", radius, points };
      this.draft.change([...kept, stroke], isFirst);
      this.draw();
    };
    paint(point);
    this.drag = { move: paint, end: () => this.changed(false) };
  }
  isInside([x, y]) { return x >= 0 && y >= 0 && x < this.draft.width && y < this.draft.height; }
  /** Return the point of the image that is nearest to a point. */
  clip([x, y]) {
    const { width, height } = this.draft;
    return [Math.min(width, Math.max(0, x)), Math.min(height, Math.max(0, y))];
  }
}
/** Return the centre of the pixel that contains a point; for a point on the last edge, of the last pixel. */
const toPixelCentre = (point) => point.map((value) => Math.max(0, Math.ceil(value) - 1) + 0.5);
const roundTenth = (value) => Math.round(10 * value) / 10;

/** Return whether a shape is a point near another point. */
const isNear = ({ shape_type: type, points: [[pointX, pointY]] }, [x, y], distance) =>
  type === "point" && Math.hypot(pointX - x, pointY - y) <= distance;

/** Return a box that also contains a point; other shapes as they are. */
function growBox(shape, [x, y]) {
  if (!isBox(shape) || contains(shape, [x, y])) return shape;
  const [left, top, right, bottom] = boxCorners([...shape.points, [x, y]]);
  return { ...shape, points: [[Math.floor(left), Math.floor(top)], [Math.ceil(right), Math.ceil(bottom)]] };
}
function contains(box, [x, y]) {
  const [left, top, right, bottom] = boxCorners(box.points);
  return x >= left && x <= right && y >= top && y <= bottom;
}
