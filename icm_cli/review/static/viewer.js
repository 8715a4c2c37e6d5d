// The image: zoom, pan, views and the comparison. Alphas are blended here, so that views change at once: by canvas
// operations on the visible part, since reading pixels back is slow. Zoomed out, a smaller copy is drawn.
import { byId, setText } from "./dom.js";

const MAX_ZOOM = 40;
const MAX_FIT_ZOOM = 4;
const PIXEL_ZOOM = 2; // from this zoom on, pixels are drawn as squares
const MARGIN_PX = 40; // part of the image that stays visible when it is moved
const CHECKER_PX = 12;
const CHECKER_GREYS = ["#5a5a5a", "#8c8c8c"];
const STAGE_GREY = "#262626";
const TINT_OPACITY = 0.55;

class Viewer {
  view = "overlay";
  colour = ""; // of the overlay, or of the background
  isComparing = false;
  division = 0.5; // where the comparison is divided, as a fraction of the width of the stage
  /** {width, height, source, before, after}: alphas of the file, and of hints that are not saved. Each is a list: the
   *  image, and copies of half, a quarter, ... of its size as far as they were needed. */
  image = null;
  zoom = 1;
  left = 0;
  top = 0;
  isFitted = true;
  canvas = byId("view");
  context = this.canvas.getContext("2d", { alpha: false });
  layer = createCanvas(1, 1); // of the size of the canvas; also for the marks
  checker = createChecker(Math.round(CHECKER_PX * window.devicePixelRatio));
  pixel = createCanvas(1, 1, { willReadFrequently: true });
  onDraw = () => {}; // called after every drawing of the image
  constructor() { new ResizeObserver(() => this.resize()).observe(byId("stage")); }
  /** Show an image. `source` and `before` are ImageBitmaps; the alpha `before` may be null. */
  setImage({ width, height, source, before }) {
    const isSameSize = this.image?.width === width && this.image?.height === height;
    this.image = { width, height, source: [source], before: before && [before], after: null };
    if (!isSameSize || this.isFitted) this.fit();
    this.invalidate();
  }
  /** Set the alpha "before" or "after"; null: there is none. */
  setAlpha(name, bitmap) { this.image[name] = bitmap && [bitmap]; this.invalidate(); }
  set(values) { Object.assign(this, values); this.invalidate(); }
  resize() {
    const { width, height } = byId("stage").getBoundingClientRect();
    if (width === 0) return; // hidden
    this.ratio = window.devicePixelRatio;
    const size = { width: Math.round(width * this.ratio), height: Math.round(height * this.ratio) };
    for (const canvas of [this.canvas, this.layer.canvas, byId("marks")]) Object.assign(canvas, size);
    if (this.isFitted) this.fit();
    this.draw(); // not in the next frame: a resized canvas is empty
  }
  fit() {
    if (this.image === null) return;
    const { width, height } = this.image;
    const zoom = Math.min(MAX_FIT_ZOOM, this.canvas.width / width, this.canvas.height / height);
    const [left, top] = [(this.canvas.width - width * zoom) / 2, (this.canvas.height - height * zoom) / 2];
    this.set({ zoom, left, top, isFitted: true });
  }
  /** Change the zoom; the point of the stage (CSS pixels) stays where it is. Without a point: the centre. */
  zoomTo(zoom, x = this.canvas.width / this.ratio / 2, y = this.canvas.height / this.ratio / 2) {
    if (this.image === null) return;
    const least = Math.min(1, 64 / Math.max(this.image.width, this.image.height));
    const target = Math.min(MAX_ZOOM, Math.max(least, zoom));
    const scale = (offset, fixed) => fixed - ((fixed - offset) * target) / this.zoom;
    const [left, top] = [scale(this.left, x * this.ratio), scale(this.top, y * this.ratio)];
    this.set({ left, top, zoom: target, isFitted: false });
  }
  /** Move the image by CSS pixels; a part of it always stays visible. */
  panBy(x, y) {
    if (this.image === null) return;
    const margin = MARGIN_PX * this.ratio;
    const clip = (start, size, stage) => Math.min(stage - margin, Math.max(margin - size * this.zoom, start));
    const left = clip(this.left + x * this.ratio, this.image.width, this.canvas.width);
    const top = clip(this.top + y * this.ratio, this.image.height, this.canvas.height);
    this.set({ left, top, isFitted: false });
  }
  /** Return the point of the image at a point of the stage (CSS pixels). */
  toImage(x, y) {
    const scale = (value, offset) => (value * this.ratio - Math.round(offset)) / this.zoom;
    return [scale(x, this.left), scale(y, this.top)];
  }
  /** Return the point of the canvas, in its pixels, at a point of the image. */
  toCanvas([x, y]) { return [Math.round(this.left) + x * this.zoom, Math.round(this.top) + y * this.zoom]; }
  /** Return [red, green, blue, alpha] of a pixel, 0..255; null outside the image. */
  readPixel(x, y) {
    if (this.image === null || x < 0 || y < 0 || x >= this.image.width || y >= this.image.height) return null;
    const read = (levels) => {
      if (levels === null) return [0, 0, 0];
      const [bitmap] = levels;
      const scale = bitmap.width / this.image.width;
      this.pixel.drawImage(bitmap, Math.floor(x * scale), Math.floor(y * scale), 1, 1, 0, 0, 1, 1);
      return this.pixel.getImageData(0, 0, 1, 1).data;
    };
    return [...read(this.image.source).slice(0, 3), read(this.image.after ?? this.image.before)[0]];
  }
  invalidate() { this.frame ??= requestAnimationFrame(() => this.draw()); }
  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = null;
    const { width, height } = this.canvas;
    fill(this.context, STAGE_GREY, [0, 0, width, height]);
    if (this.image !== null) {
      const { before, after } = this.image;
      const x = this.isComparing ? Math.round(this.division * width) : 0;
      this.drawPart(0, x, after === null ? "source" : this.view, before);
      this.drawPart(x, width, this.view, after ?? before);
    }
    this.drawLabels();
    this.onDraw();
  }
  /** Draw one view between two columns of the canvas. */
  drawPart(start, end, view, alpha) {
    const [left, top] = [Math.round(this.left), Math.round(this.top)];
    const [right, bottom] = this.toCanvas([this.image.width, this.image.height]).map(Math.round);
    const [x, y] = [Math.max(start, left), Math.max(0, top)];
    const box = [x, y, Math.min(end, right) - x, Math.min(this.canvas.height, bottom) - y];
    if (box[2] <= 0 || box[3] <= 0) return;
    const drawScaled = (context, levels) => {
      context.imageSmoothingEnabled = this.zoom < PIXEL_ZOOM;
      context.drawImage(findLevel(levels, right - left), left, top, right - left, bottom - top);
    };
    const drawSource = (context) => drawScaled(context, this.image.source);
    const drawAlpha = (context) => (alpha ? drawScaled(context, alpha) : fill(context, "#000", box));
    const drawColour = (colour) => (context) => fill(context, colour, box);
    this.context.save();
    this.context.beginPath();
    this.context.rect(...box);
    this.context.clip(); // to the part on one side of the divider
    if (view === "source") drawSource(this.context);
    else if (view === "alpha") drawAlpha(this.context);
    else if (view === "overlay") this.blend(box, drawColour(this.colour), drawAlpha, drawSource, TINT_OPACITY);
    else this.blend(box, drawSource, drawAlpha, drawColour(view === "colour" ? this.colour : this.checker));
    this.context.restore();
  }
  /** Draw top * m + bottom * (1 - m), m = alpha * opacity. The arguments draw into a context. */
  blend(box, drawTop, drawAlpha, drawBottom, opacity = 1) {
    const { context, layer } = this;
    const combine = (target, operation, draw) => {
      target.globalCompositeOperation = operation;
      draw(target);
      target.globalCompositeOperation = "source-over";
    };
    const grey = Math.round(255 * opacity);
    for (const target of [layer, context]) {
      drawAlpha(target);
      if (opacity < 1) combine(target, "multiply", () => fill(target, `rgb(${grey}, ${grey}, ${grey})`, box));
    }
    combine(layer, "multiply", drawTop);
    combine(context, "difference", () => fill(context, "#fff", box));
    combine(context, "multiply", drawBottom);
    combine(context, "lighter", () => context.drawImage(layer.canvas, ...box, ...box));
  }
  drawLabels() {
    byId("compare-labels").hidden = !this.isComparing || this.image === null;
    byId("compare-labels").style.left = `${100 * this.division}%`;
    const hasAnswer = Boolean(this.image?.after);
    setText(byId("compare-left"), hasAnswer ? "before: alpha of the file" : "before: source");
    setText(byId("compare-right"), hasAnswer ? "after: with hints" : `after: ${this.view}`);
  }
}

/** Return the smallest copy of an image that is at least `width` pixels wide. */
function findLevel(levels, width) {
  let level = 0;
  while (levels[level].width >= 2 * width && levels[level].height > 1) {
    level += 1;
    if (level === levels.length) levels.push(halve(levels[level - 1]));
  }
  return levels[level];
}
/** Create a canvas, and return its context. */
export function createCanvas(width, height, settings = {}) {
  const context = document.createElement("canvas").getContext("2d", settings);
  Object.assign(context.canvas, { width, height });
  return context;
}
function fill(context, style, box) { context.fillStyle = style; context.fillRect(...box); }
function halve(image) {
  const context = createCanvas(Math.ceil(image.width / 2), Math.ceil(image.height / 2), { alpha: false });
  context.drawImage(image, 0, 0, context.canvas.width, context.canvas.height);
  return context.canvas;
}
function createChecker(side) {
  const tile = createCanvas(2 * side, 2 * side);
  fill(tile, CHECKER_GREYS[0], [0, 0, 2 * side, 2 * side]);
  for (const x of [0, side]) fill(tile, CHECKER_GREYS[1], [x, side - x, side, side]); // the other diagonal
  return tile.createPattern(tile.canvas, "repeat");
}

export const viewer = new Viewer();
