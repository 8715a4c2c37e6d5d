// The image: zoom, pan, views and the comparison. The alpha is blended here, so that views and colours change at once.
//
// A blend is top * alpha + bottom * (1 - alpha), made of canvas operations on the visible part only, since reading the
// pixels of large images back would be slow. Zoomed out, a smaller copy of the image is drawn.

import { byId, setText } from "./dom.js";

const MAX_ZOOM = 40;
const MAX_FIT_ZOOM = 4;
/** From this zoom on, pixels are drawn as squares. */
const PIXEL_ZOOM = 2;
const CHECKER_PX = 12;
const CHECKER_GREYS = ["#5a5a5a", "#8c8c8c"];
const TINT_OPACITY = 0.55;

/** An image with copies of half, a quarter, ... of its size. */
class Pyramid {
  constructor(bitmap) {
    this.levels = [bitmap];
  }

  /** Return the smallest copy that has at least as many pixels as will be drawn. */
  findLevel(width) {
    let level = 0;
    while (this.levels[level].width >= 2 * width && this.levels[level].height > 1) {
      level += 1;
      if (level === this.levels.length) this.levels.push(halve(this.levels[level - 1]));
    }
    return this.levels[level];
  }
}

export class Viewer {
  view = "checker";
  background = "#808080";
  tint = "#ff3030";
  isComparing = false;
  /** Where the comparison is divided, as a fraction of the width of the stage. */
  division = 0.5;
  image = null;
  zoom = 1;
  left = 0;
  top = 0;
  isFitted = true;

  /** `drawn()` is called after every drawing of the image. */
  constructor(drawn) {
    this.canvas = byId("view");
    this.context = this.canvas.getContext("2d", { alpha: false });
    this.layer = document.createElement("canvas").getContext("2d");
    this.pixel = createPixel();
    this.drawn = drawn;
    new ResizeObserver(() => this.resize()).observe(byId("stage"));
  }

  /** Show an image: {width, height, source, before, after}, the last three as ImageBitmap, alphas or null. */
  setImage({ width, height, source, before }) {
    const isSameSize = this.image?.width === width && this.image?.height === height;
    this.image = { width, height, source: new Pyramid(source), before: toPyramid(before), after: null };
    if (!isSameSize || this.isFitted) this.fit();
    this.invalidate();
  }

  clear() {
    this.image = null;
    this.invalidate();
  }

  /** Set the alpha of the file. */
  setBefore(bitmap) {
    this.image.before = toPyramid(bitmap);
    this.invalidate();
  }

  /** Set the alpha of the hints that are not saved; null: there are none. */
  setAfter(bitmap) {
    this.image.after = toPyramid(bitmap);
    this.invalidate();
  }

  set(values) {
    Object.assign(this, values);
    this.invalidate();
  }

  resize() {
    const { width, height } = byId("stage").getBoundingClientRect();
    if (width === 0) return; // hidden
    this.ratio = window.devicePixelRatio;
    this.canvas.width = Math.round(width * this.ratio);
    this.canvas.height = Math.round(height * this.ratio);
    if (this.isFitted) this.fit();
    this.draw(); // not in the next frame: a resized canvas is empty
  }

  fit() {
    if (this.image === null) return;
    const { width, height } = this.image;
    this.zoom = Math.min(MAX_FIT_ZOOM, this.canvas.width / width, this.canvas.height / height);
    this.left = (this.canvas.width - width * this.zoom) / 2;
    this.top = (this.canvas.height - height * this.zoom) / 2;
    this.isFitted = true;
    this.invalidate();
  }

  /** Change the zoom; the point of the stage (CSS pixels) stays where it is. Without a point: the centre. */
  zoomTo(zoom, x = this.canvas.width / this.ratio / 2, y = this.canvas.height / this.ratio / 2) {
    if (this.image === null) return;
    const least = Math.min(1, 64 / Math.max(this.image.width, this.image.height));
    const [deviceX, deviceY] = [x * this.ratio, y * this.ratio];
    const target = Math.min(MAX_ZOOM, Math.max(least, zoom));
    this.left = deviceX - ((deviceX - this.left) * target) / this.zoom;
    this.top = deviceY - ((deviceY - this.top) * target) / this.zoom;
    this.zoom = target;
    this.isFitted = false;
    this.invalidate();
  }

  /** Move the image by CSS pixels; a part of it always stays visible. */
  panBy(x, y) {
    if (this.image === null) return;
    const [width, height] = [this.image.width * this.zoom, this.image.height * this.zoom];
    const margin = 40 * this.ratio;
    this.left = Math.min(this.canvas.width - margin, Math.max(margin - width, this.left + x * this.ratio));
    this.top = Math.min(this.canvas.height - margin, Math.max(margin - height, this.top + y * this.ratio));
    this.isFitted = false;
    this.invalidate();
  }

  /** Return the point of the image at a point of the stage (CSS pixels). */
  toImage(x, y) {
    return [(x * this.ratio - Math.round(this.left)) / this.zoom, (y * this.ratio - Math.round(this.top)) / this.zoom];
  }

  /** Return the point of the canvas, in its pixels, at a point of the image. */
  toCanvas([x, y]) {
    return [Math.round(this.left) + x * this.zoom, Math.round(this.top) + y * this.zoom];
  }

  /** Return [red, green, blue, alpha] of a pixel, 0..255; null outside the image. */
  readPixel(x, y) {
    if (this.image === null || x < 0 || y < 0 || x >= this.image.width || y >= this.image.height) return null;
    const read = (pyramid) => {
      if (pyramid === null) return [0, 0, 0];
      const [bitmap] = pyramid.levels;
      const scale = bitmap.width / this.image.width;
      this.pixel.drawImage(bitmap, Math.floor(x * scale), Math.floor(y * scale), 1, 1, 0, 0, 1, 1);
      return this.pixel.getImageData(0, 0, 1, 1).data;
    };
    return [...read(this.image.source).slice(0, 3), read(this.image.after ?? this.image.before)[0]];
  }

  /** Draw in the next frame. */
  invalidate() {
    this.frame ??= requestAnimationFrame(() => this.draw());
  }

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = null;
    const { width, height } = this.canvas;
    this.context.fillStyle = "#262626";
    this.context.fillRect(0, 0, width, height);
    if (this.image !== null) {
      const { before, after } = this.image;
      if (this.isComparing) {
        const x = Math.round(this.division * width);
        const [leftView, leftAlpha] = after === null ? ["source", null] : [this.view, before];
        this.drawPart(0, x, leftView, leftAlpha);
        this.drawPart(x, width, this.view, after ?? before);
      } else this.drawPart(0, width, this.view, after ?? before);
    }
    this.drawLabels();
    this.drawn();
  }

  /** Draw one view between two columns of the canvas. */
  drawPart(start, end, view, alpha) {
    const [left, top] = [Math.round(this.left), Math.round(this.top)];
    const [right, bottom] = this.toCanvas([this.image.width, this.image.height]).map(Math.round);
    const box = [Math.max(start, left), Math.max(0, top), Math.min(end, right), Math.min(this.canvas.height, bottom)];
    const [width, height] = [box[2] - box[0], box[3] - box[1]];
    if (width <= 0 || height <= 0) return;
    const place = (context, pyramid) => {
      const level = pyramid.findLevel(right - left);
      context.imageSmoothingEnabled = this.zoom < PIXEL_ZOOM;
      context.drawImage(level, left, top, right - left, bottom - top);
    };
    const drawSource = (context) => place(context, this.image.source);
    const drawAlpha = (context) => {
      if (alpha === null) fill(context, "#000", box);
      else place(context, alpha);
    };
    const { context } = this;
    context.save();
    context.beginPath();
    context.rect(box[0], box[1], width, height);
    context.clip();
    if (view === "source") drawSource(context);
    else if (view === "alpha") drawAlpha(context);
    else if (view === "overlay") this.blend(box, (each) => fill(each, this.tint, box), drawAlpha, drawSource, TINT_OPACITY);
    else if (view === "colour") this.blend(box, drawSource, drawAlpha, (each) => fill(each, this.background, box));
    else this.blend(box, drawSource, drawAlpha, (each) => this.fillChecker(each, box));
    context.restore();
  }

  /** Draw top * m + bottom * (1 - m), m = alpha * opacity. The arguments draw into the context that they are given. */
  blend(box, drawTop, drawAlpha, drawBottom, opacity = 1) {
    const { context, layer } = this;
    const grey = `rgb(${Array(3).fill(Math.round(255 * opacity))})`;
    const multiply = (target, paint) => {
      target.globalCompositeOperation = "multiply";
      paint(target);
      target.globalCompositeOperation = "source-over";
    };
    const drawWeight = (target) => {
      drawAlpha(target);
      if (opacity < 1) multiply(target, (each) => fill(each, grey, box));
    };
    if (layer.canvas.width !== this.canvas.width || layer.canvas.height !== this.canvas.height) {
      layer.canvas.width = this.canvas.width;
      layer.canvas.height = this.canvas.height;
    }
    layer.save();
    layer.beginPath();
    layer.rect(box[0], box[1], box[2] - box[0], box[3] - box[1]);
    layer.clip();
    drawWeight(layer);
    multiply(layer, drawTop);
    layer.restore();
    drawWeight(context);
    context.globalCompositeOperation = "difference";
    fill(context, "#fff", box);
    context.globalCompositeOperation = "source-over";
    multiply(context, drawBottom);
    context.globalCompositeOperation = "lighter";
    context.drawImage(layer.canvas, box[0], box[1], box[2] - box[0], box[3] - box[1], ...toRectangle(box));
    context.globalCompositeOperation = "source-over";
  }

  fillChecker(context, box) {
    const side = Math.round(CHECKER_PX * this.ratio);
    if (this.checker?.side !== side) this.checker = { side, pattern: createChecker(context, side) };
    fill(context, this.checker.pattern, box);
  }

  drawLabels() {
    const isShown = this.isComparing && this.image !== null;
    for (const id of ["compare-left", "compare-right"]) byId(id).hidden = !isShown;
    if (!isShown) return;
    const hasAnswer = this.image.after !== null;
    setText(byId("compare-left"), hasAnswer ? "before: alpha of the file" : "before: source");
    setText(byId("compare-right"), hasAnswer ? "after: with hints" : `after: ${this.view}`);
    byId("compare-left").style.right = `${100 * (1 - this.division)}%`;
    byId("compare-right").style.left = `${100 * this.division}%`;
  }
}

const toPyramid = (bitmap) => (bitmap === null ? null : new Pyramid(bitmap));

const toRectangle = ([left, top, right, bottom]) => [left, top, right - left, bottom - top];

function fill(context, style, box) {
  context.fillStyle = style;
  context.fillRect(...toRectangle(box));
}

function halve(image) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.ceil(image.width / 2);
  canvas.height = Math.ceil(image.height / 2);
  const context = canvas.getContext("2d", { alpha: false });
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas;
}

function createChecker(context, side) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 2 * side;
  const tile = canvas.getContext("2d");
  for (const [x, y] of [[0, 0], [0, 1], [1, 0], [1, 1]]) {
    tile.fillStyle = CHECKER_GREYS[(x + y) % 2];
    tile.fillRect(x * side, y * side, side, side);
  }
  return context.createPattern(canvas, "repeat");
}

function createPixel() {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  return canvas.getContext("2d", { willReadFrequently: true });
}
