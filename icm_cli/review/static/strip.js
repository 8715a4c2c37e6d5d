// Film strip: the frames of the shot, or the neighbours in the list, around the image that is open.

import { baseName, byId, create, formatQuality, setText } from "./dom.js";
import { STATUS_LABELS } from "./grid.js";
import { store } from "./store.js";
import { releaseThumbnail, showThumbnail } from "./thumbnails.js";

const FRAME_PX = 112;

export class Strip {
  ids = [];
  current = null;
  /** How many frames the user has scrolled away from the current one. */
  offset = 0;
  frames = new Map();

  constructor(open) {
    this.box = byId("strip-frames");
    this.box.addEventListener("click", (event) => {
      const frame = event.target.closest(".frame");
      if (frame !== null) open(Number(frame.dataset.id));
    });
    this.box.addEventListener("wheel", (event) => this.scroll(event), { passive: false });
    new ResizeObserver(() => this.draw()).observe(this.box);
    store.on("items", (changed) => this.redraw(changed));
  }

  /** Show ids around the current one. `title` says what they are. */
  show(ids, current, title) {
    this.ids = ids;
    this.current = current;
    this.offset = 0;
    setText(byId("strip-title"), title);
    this.draw();
  }

  clear() {
    for (const [id, frame] of this.frames) this.remove(id, frame);
  }

  scroll(event) {
    event.preventDefault();
    this.offset += Math.sign(event.deltaY + event.deltaX) * 2;
    this.draw();
  }

  draw() {
    const count = Math.max(1, Math.floor(this.box.clientWidth / FRAME_PX));
    const center = this.ids.indexOf(this.current);
    if (center < 0 || this.box.clientWidth === 0) return;
    const latest = Math.max(0, this.ids.length - count);
    const first = Math.min(latest, Math.max(0, center + this.offset - Math.floor(count / 2)));
    this.offset = this.offset === 0 ? 0 : first - center + Math.floor(count / 2);
    const shown = this.ids.slice(first, first + count);
    for (const [id, frame] of this.frames) if (!shown.includes(id)) this.remove(id, frame);
    for (const id of shown) this.box.append(this.place(id));
  }

  redraw(changed) {
    if (this.box.clientWidth > 0) for (const id of changed) if (this.frames.has(id)) this.fill(id, this.frames.get(id));
  }

  remove(id, frame) {
    releaseThumbnail(frame.image);
    frame.root.remove();
    this.frames.delete(id);
  }

  place(id) {
    if (!this.frames.has(id)) {
      const image = create("img", { alt: "", draggable: false });
      const caption = create("span", { className: "caption" });
      const root = create("button", { type: "button", className: "frame" });
      root.append(create("span", { className: "thumbnail" }, image), caption);
      this.frames.set(id, { root, image, caption });
    }
    const frame = this.frames.get(id);
    this.fill(id, frame);
    return frame.root;
  }

  fill(id, { root, image, caption }) {
    const item = store.items.get(id);
    root.dataset.id = id;
    root.dataset.status = item.status;
    root.title = item.name;
    const label = `${item.name}, quality ${formatQuality(item.quality)}, ${STATUS_LABELS[item.status]}`;
    root.setAttribute("aria-label", label);
    if (id === this.current) root.setAttribute("aria-current", "true");
    else root.removeAttribute("aria-current");
    setText(caption, baseName(item.name));
    showThumbnail(image, item, store.settings.thumbnailView);
  }
}
