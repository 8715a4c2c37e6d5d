// Film strip: the frames of the shot, or the neighbours in the list, around the image that is open.
import { STATUS_LABELS, baseName, byId, clone, formatQuality, setText } from "./dom.js";
import { store } from "./store.js";
import { releaseThumbnail, showThumbnail } from "./thumbnails.js";

const FRAME_PX = 112;

export class Strip {
  ids = [];
  current = null;
  frames = new Map();
  constructor(open) {
    this.box = byId("strip-frames");
    this.box.addEventListener("click", ({ target }) => {
      if (target !== this.box) open(Number(target.closest(".frame").dataset.id));
    });
    new ResizeObserver(() => this.draw()).observe(this.box);
    store.on("items", (changed) => {
      for (const [id, frame] of this.frames) if (changed.has(id)) this.fill(id, frame);
    });
  }
  /** Show ids around the current one. `title` says what they are. */
  show(ids, current, title) {
    Object.assign(this, { ids, current });
    setText(byId("strip-title"), title);
    this.draw();
  }
  clear() { this.show([], null, ""); }
  draw() {
    const count = Math.max(1, Math.floor(this.box.clientWidth / FRAME_PX));
    const centred = this.ids.indexOf(this.current) - Math.floor(count / 2);
    const first = Math.max(0, Math.min(this.ids.length - count, centred));
    const shown = this.ids.slice(first, first + count);
    const before = this.frames;
    this.frames = new Map(shown.map((id) => [id, before.get(id) ?? clone("frame-template")]));
    for (const [id, { image }] of before) if (!this.frames.has(id)) releaseThumbnail(image);
    for (const [id, frame] of this.frames) this.fill(id, frame);
    this.box.replaceChildren(...[...this.frames.values()].map(({ root }) => root));
  }
  fill(id, { root, image, caption, folder }) {
    const item = store.items.get(id);
    Object.assign(root.dataset, { id, status: item.status });
    const label = `${item.name}, quality ${formatQuality(item.quality)}, ${STATUS_LABELS[item.status]}`;
    Object.assign(root, { title: item.name, ariaLabel: label, ariaCurrent: id === this.current });
    setText(caption, baseName(item.name));
    setText(folder, item.folder);
    showThumbnail(image, item, store.settings.thumbnailView);
  }
}
