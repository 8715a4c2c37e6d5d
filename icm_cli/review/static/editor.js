// Tools on the image: points, box, brushes, moving and zooming, and a pointer that the keyboard moves.
import { byId, notify, pressButton, setText } from "./dom.js";
import { drawMarks } from "./marks.js";
import { boxCorners, isBox, isPainted, isPoint, isPositive } from "./shapes.js";
import { store } from "./store.js";
import { viewer } from "./viewer.js";

const HIT_PX = 9;
const DIVIDER_PX = 8;
const MOVE_PX = 4; // a point moves only if it is dragged further than this
const ZOOM_STEP = 1.2;
const KEY_STEP_PX = 10;
const BRUSHES = ["keep", "drop", "erase"];
const OPPOSITES = { keep: "bg", drop: "fg", bg: "keep", fg: "drop" }; // labels of paint and of points

class Editor {
  canvas = byId("marks");
  tool = "point";
  draft = null;
  isVisible = true;
  isSpaceDown = false;
  /** Where the mouse is, and where the pointer of the keyboard is, in pixels of the image; null: nowhere. */
  cursor = null;
  crosshair = null;
  drag = null; // the drag in progress: {move(point of the image, event), end?()}
  before = null; // the hints when the drag began
  onChange = () => {}; // called with `isDragging` when the hints of the draft have changed
  constructor() {
    Object.assign(this.canvas, {
      onpointerdown: (event) => this.handleDown(event), onpointermove: (event) => this.handleMove(event),
      onpointerup: () => this.endDrag(), onpointercancel: () => this.endDrag(),
      onpointerleave: () => this.setCursor(null), onwheel: (event) => this.handleWheel(event),
      oncontextmenu: (event) => event.preventDefault(),
    });
    byId("brush-size").oninput = ({ target }) => this.setBrush(Number(target.value));
    this.setTool(this.tool);
    this.setBrush(store.settings.brush);
  }
  setDraft(draft) { Object.assign(this, { draft, drag: null, crosshair: null }); this.draw(); }
  setTool(tool) {
    this.tool = tool;
    pressButton("tools", "tool", tool);
    setText(byId("tool-hint"), byId("tools").querySelector(`[data-tool="${tool}"]`).title);
    this.canvas.dataset.tool = tool;
    this.draw();
  }
  /** Set the radius of the brush in pixels of the image. */
  setBrush(radius) {
    byId("brush-size").value = Math.round(radius); // within its limits
    const brush = Number(byId("brush-size").value);
    setText(byId("brush-value"), `${brush} px`);
    store.setSettings({ brush });
    this.draw();
  }
  setDivision(division) {
    byId("compare-position").value = 100 * division;
    viewer.set({ division: Math.min(1, Math.max(0, division)) });
  }
  setCursor(cursor) { this.cursor = cursor; this.draw(); }
  draw() {
    const brush = BRUSHES.includes(this.tool) ? { radius: store.settings.brush, label: this.tool } : null;
    drawMarks({ ...this, shapes: this.draft?.shapes ?? [], brush });
    this.showPixel(this.crosshair ?? this.cursor);
  }
  showPixel(point) {
    const pixel = point && viewer.readPixel(...point);
    if (!pixel) return setText(byId("readout"), "");
    const [red, green, blue, alpha] = pixel;
    const position = point.map(Math.floor).join(", ");
    const value = `${alpha} (${(alpha / 255).toFixed(2)})`;
    setText(byId("readout"), `x, y ${position}   RGB ${red} ${green} ${blue}   A ${value}`);
  }
  handleDown(event) {
    if (this.draft === null || this.drag !== null) return;
    const { button, offsetX, offsetY } = event;
    this.canvas.setPointerCapture(event.pointerId);
    this.crosshair = null;
    this.before = this.draft.shapes;
    if (button === 1 || this.isSpaceDown || (this.tool === "pan" && button === 0)) {
      this.drag = { move: (_, { movementX, movementY }) => viewer.panBy(movementX, movementY) };
    } else if (viewer.isComparing && Math.abs(offsetX - viewer.division * this.canvas.clientWidth) < DIVIDER_PX) {
      this.drag = { move: (_, moved) => this.setDivision(moved.offsetX / this.canvas.clientWidth) };
    } else if (button === 0 || (button === 2 && this.tool === "point")) {
      this.press(viewer.toImage(offsetX, offsetY), button === 2 || event.altKey || event.ctrlKey);
    }
    if (button === 1) event.preventDefault(); // no automatic scrolling
  }
  handleMove(event) {
    const point = viewer.toImage(event.offsetX, event.offsetY);
    this.drag?.move(point, event);
    this.setCursor(point);
  }
  handleWheel(event) {
    event.preventDefault();
    const steps = event.deltaY / (event.ctrlKey ? 25 : 100); // a pinch on a touchpad has small steps
    viewer.zoomTo(viewer.zoom / ZOOM_STEP ** steps, event.offsetX, event.offsetY);
  }
  endDrag() {
    this.drag?.end?.();
    if (this.drag !== null && this.draft.shapes !== this.before) this.onChange(false);
    this.drag = null;
  }
  /** Cancel the drag in progress, and take back what it has changed. Returns whether there was one. */
  cancelDrag() {
    if (this.drag === null) return false;
    this.drag = null;
    if (this.draft.past.at(-1) === this.before) {
      this.draft.cancel();
      this.onChange(false);
    }
    return true;
  }
  /** Return where the pointer of the keyboard is on the stage, in CSS pixels; [] without one. */
  findCrosshair() { return this.crosshair ? viewer.toCanvas(this.crosshair).map((each) => each / viewer.ratio) : []; }
  /** Move the pointer of the keyboard by steps of the screen. */
  moveCrosshair(x, y, stepPx = KEY_STEP_PX) {
    const { crosshair, draft } = this;
    if (draft === null || (this.drag !== null && crosshair === null)) return; // the mouse drags
    this.canvas.focus({ preventScroll: true }); // else Enter presses the button with the focus
    const step = (stepPx * viewer.ratio) / viewer.zoom;
    const centre = viewer.toImage(this.canvas.clientWidth / 2, this.canvas.clientHeight / 2);
    const target = crosshair === null ? centre : [crosshair[0] + x * step, crosshair[1] + y * step];
    this.crosshair = this.clip(target);
    this.drag?.move(this.crosshair);
    this.draw();
  }
  /** Use the tool at the pointer of the keyboard. A box needs two presses: its corners. */
  pressCrosshair(isNegative) {
    if (this.crosshair === null || this.draft === null) return;
    const isBoxStart = this.tool === "box" && this.drag === null;
    if (this.drag === null) {
      this.before = this.draft.shapes;
      this.press(this.crosshair, isNegative);
    }
    if (isBoxStart) notify("Move the pointer to the opposite corner, and press Enter.");
    else this.endDrag();
  }
  press(point, isNegative) {
    if (BRUSHES.includes(this.tool)) this.pressBrush(point);
    else if (this.tool === "box") this.pressBox(this.clip(point).map(Math.round));
    else if (this.tool === "point") this.pressPoint(point, isNegative ? "bg" : "fg");
  }
  /** Set the hints during a drag. All changes of a drag are one step for undo. */
  change(shapes) {
    this.draft.change(shapes, this.draft.shapes === this.before);
    this.draw();
  }
  /** Begin to move the point at a position, or add one. An old point that is released where it was is removed. */
  pressPoint(start, label) {
    const hit = this.findPoint(start);
    if (hit === undefined && !this.isInside(start)) return;
    const shape = hit ?? { label, shape_type: "point" };
    const others = this.before.filter((each) => each !== hit);
    const place = (target) => {
      const point = toPixelCentre(this.clip(target));
      isRefused = this.isTaken(others, point, shape.label);
      if (isRefused) return;
      const grown = isPositive(shape) ? others.map((each) => growBox(each, point)) : others;
      this.change([...grown, { ...shape, points: [point] }]);
      this.onChange(true);
    };
    let [isMoved, isRefused] = [false, false];
    const move = ([x, y]) => {
      isMoved ||= Math.hypot(x - start[0], y - start[1]) * viewer.zoom >= MOVE_PX * viewer.ratio;
      if (isMoved) place([x, y]);
    };
    const end = () => {
      if (isRefused) this.cancelDrag(); // the point goes back
      else if (hit !== undefined && !isMoved) this.change(others);
    };
    this.drag = { move, end };
    if (hit === undefined) place(start);
  }
  /** Return whether no point with a label may be placed at a point because of hints that say the opposite. */
  isTaken(shapes, point, label) {
    const opposite = OPPOSITES[label];
    const isPaint = isPainted(shapes, point, opposite);
    const isOpposite = shapes.some((each) => each.label !== label && isNear(each, point, 1));
    if (isPaint) notify(`This is painted with ${opposite === "keep" ? "Keep" : "Drop"}. Erase the paint first (E).`);
    else if (isOpposite) notify("A point here says the opposite. Remove it first (M shows the hints).");
    return isPaint || isOpposite;
  }
  findPoint([x, y]) {
    const reach = (HIT_PX * viewer.ratio) / viewer.zoom;
    return this.draft.shapes.findLast((shape) => this.isVisible && isNear(shape, [x, y], reach));
  }
  /** Begin a box. It replaces the earlier box, and the points on the object that are outside it. */
  pressBox(start) {
    const move = (point) => {
      const end = this.clip(point).map(Math.round);
      if (start[0] === end[0] || start[1] === end[1]) return;
      const box = { label: "fg", shape_type: "rectangle", points: [start, end] };
      const isOutside = ({ points }) => !points.every((point) => contains(box, point));
      const isReplaced = (each) => isBox(each) || (isPoint(each) && isPositive(each) && isOutside(each));
      this.change([box, ...this.before.filter((each) => !isReplaced(each))]);
      this.onChange(true);
    };
    this.drag = { move };
  }
  /** Begin a stroke. It replaces points with the opposite label; the strokes below it stay in the list. */
  pressBrush(start) {
    const stroke = { label: this.tool, shape_type: "brush", radius: store.settings.brush, points: [] };
    let kept = this.before;
    const move = (target) => {
      const isOpposite = (each) => each.label === OPPOSITES[stroke.label] && isNear(each, target, stroke.radius + 1);
      stroke.points = [...stroke.points, target.map(roundTenth)];
      kept = kept.filter((each) => !isOpposite(each));
      this.change([...kept, { ...stroke }]);
    };
    move(start);
    this.drag = { move };
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

export const editor = new Editor();
