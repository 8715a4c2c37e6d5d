// Film strip: the frames of the shot, or the neighbours in the list, around the image that is open.
import { STATUS_LABELS, byId, clone, setText } from "./dom.js";
import { store } from "./store.js";
import { fillThumbnail, releaseThumbnail } from "./thumbnails.js";

const FRAME_PX = 112;
const box = byId("strip-frames");
let [ids, current] = [[], null];
let frames = new Map(); // frames in use by id

new ResizeObserver(draw).observe(box);
store.on("items", draw);

/** Show ids around the current one. `title` says what they are. */
export function show(newIds, newCurrent, title) {
  [ids, current] = [newIds, newCurrent];
  setText(byId("strip-title"), title);
  draw();
}

function draw() {
  const count = Math.max(1, Math.floor(box.clientWidth / FRAME_PX));
  const centred = ids.indexOf(current) - Math.floor(count / 2);
  const first = Math.max(0, Math.min(ids.length - count, centred));
  const before = frames;
  frames = new Map(ids.slice(first, first + count).map((id) => [id, before.get(id) ?? clone("frame-template")]));
  for (const [id, { image }] of before) if (!frames.has(id)) releaseThumbnail(image);
  for (const [id, frame] of frames) {
    const item = store.items.get(id);
    fillThumbnail(frame, item, [STATUS_LABELS[item.status]]);
    frame.root.ariaCurrent = id === current;
  }
  if (String([...frames.keys()]) === String([...before.keys()])) return; // the focus stays
  box.replaceChildren(...[...frames.values()].map(({ root }) => root));
}
