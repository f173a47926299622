// The page of `datalth-shards explore`. All it shows stands in #data. Names come from others, so they only become text.

const data = JSON.parse(document.getElementById("data").textContent);
const [rows, columns] = data.grid;
const count = rows * columns; // N, patches of a view
const state = { k: null, view: 0, mode: "ticket", open: null }; // k null: each set's own, as mined

const byId = (id) => document.getElementById(id);
const percent = (share) => `${(100 * share).toFixed(0)} %`;
const images = (number) => `${number.toLocaleString("en")} image${number === 1 ? "" : "s"}`;

/** An element with text, attributes and children. */
function make(name, { text, ...attributes } = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  element.append(...children);
  return element;
}

function table(head, body, figures = []) {
  const cells = (name, texts) => texts.map((text, i) => make(name, { text, ...(figures.includes(i) ? { class: "figure" } : {}) }));
  return make("table", {},
    make("thead", {}, make("tr", {}, ...cells("th", head))),
    make("tbody", {}, ...body.map((texts) => make("tr", {}, ...cells("td", texts)))));
}

// ---- Rankings ------------------------------------------------------------------------------------------------------------

/** Base64 [images, views, N] of patches, best first -> the same shape of ranks: which place each patch has. */
function ranksOf(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const rankings = count > 256 ? new Uint16Array(bytes.buffer) : bytes;
  const ranks = new Uint16Array(rankings.length);
  for (let start = 0; start < rankings.length; start += count)
    for (let rank = 0; rank < count; rank++) ranks[start + rankings[start + rank]] = rank;
  return ranks;
}

for (const set of data.sets) {
  set.ranks = ranksOf(set.rankings);
  set.shown = set.boxes[0].length; // views on this page
}

/** Ranks [N] of one view; null where the set has no such view. */
function ranksAt(set, image, view = state.view) {
  if (view >= set.shown) return null;
  const start = (image * set.shown + view) * count;
  return set.ranks.subarray(start, start + count);
}

const keptOf = (set) => state.k ?? set.k;

/** How much two sets agree on an image, as `datalth-shards diff` says it; null where the view has another box in each. */
function agreement(a, b, image) {
  const [first, second] = [ranksAt(a, image), ranksAt(b, image)];
  if (!first || !second) return null;
  if (a.boxes[image][state.view].some((number, i) => number !== b.boxes[image][state.view][i])) return null;
  const [ka, kb] = [keptOf(a), keptOf(b)];
  let common = 0;
  for (let patch = 0; patch < count; patch++) common += first[patch] < ka && second[patch] < kb;
  return { overlap: common / Math.min(ka, kb), iou: common / (ka + kb - common) };
}

// ---- Colors --------------------------------------------------------------------------------------------------------------

const HEAT = Array.from({ length: 256 }, (_, i) => {
  const place = (i / 255) * (data.colors.heat.length - 1);
  const low = Math.min(Math.floor(place), data.colors.heat.length - 2);
  return data.colors.heat[low].map((from, c) => from + (data.colors.heat[low + 1][c] - from) * (place - low));
});
const heat = (share) => HEAT[Math.round(255 * Math.min(1, Math.max(0, share)))];

/** A pixel a patch; the browser makes them large. `colorOf(patch)` is [r, g, b] and alpha. */
function paint(canvas, colorOf) {
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const picture = context.createImageData(canvas.width, canvas.height);
  for (let i = 0; i < canvas.width * canvas.height; i++) {
    const [color, alpha] = colorOf(i);
    picture.data.set([...color, alpha], 4 * i);
  }
  context.putImageData(picture, 0, 0);
}

const NOTHING = [[0, 0, 0], 0];
const DROPPED = [data.colors.shade, 204];

/** What lies over a view: dropped patches dimmed, or all of them colored by rank. */
function paintTile(canvas, ranks, kept) {
  if (state.mode === "ticket") paint(canvas, (patch) => (ranks[patch] < kept ? NOTHING : DROPPED));
  else if (state.mode === "rank") paint(canvas, (patch) => [heat(1 - ranks[patch] / Math.max(1, count - 1)), 166]);
  else paint(canvas, () => NOTHING);
}

// ---- Tiles, cards, maps --------------------------------------------------------------------------------------------------

/** A view of a set with its ticket over it: `.show(set, image)` draws it anew. */
function makeTile(classes = "tile") {
  const picture = make("img", { alt: "", decoding: "async" });
  const canvas = make("canvas", { width: columns, height: rows, "aria-hidden": "true" });
  const none = make("span", { class: "none", text: "no such view" });
  const element = make("span", { class: classes }, picture, canvas, none);
  let shown = null;
  const show = (set, image) => {
    const ranks = ranksAt(set, image);
    none.hidden = ranks !== null;
    picture.hidden = canvas.hidden = ranks === null;
    if (!ranks) return;
    const place = set.pictures[image][state.view];
    if (place !== shown) picture.src = `data:image/jpeg;base64,${data.pictures[place]}`;
    shown = place;
    paintTile(canvas, ranks, keptOf(set));
  };
  return { element, canvas, show };
}

function makeCard(image) {
  const { key, source } = data.images[image];
  const tiles = data.sets.map(() => makeTile());
  const notes = data.sets.map((_, i) => make("span", i ? { class: "faint" } : { text: source.split("/").pop(), title: key }));
  const button = make("button", { type: "button", "aria-label": `${key}, larger` },
    make("span", { class: "tiles" }, ...tiles.map((tile) => tile.element)));
  button.addEventListener("click", () => openDetail(image));
  const element = make("li", { class: "card" }, button, make("div", { class: "notes small" }, ...notes));
  const text = [key, source, data.images[image].class].join("\n").toLowerCase();
  const show = () => {
    data.sets.forEach((set, i) => {
      tiles[i].show(set, image);
      if (!i) return;
      const found = agreement(data.sets[0], set, image);
      notes[i].textContent = found ? `overlap ${found.overlap.toFixed(2)}` : "another box";
      notes[i].title = found
        ? `with ${data.sets[0].name}; IoU ${found.iou.toFixed(2)}`
        : "the sets cut this view out of the image at other places";
    });
  };
  return { element, image, text, show };
}

/** How often each patch is in the tickets of some images of a set. */
function makeMap(set, caption) {
  const canvas = make("canvas", { width: columns, height: rows, role: "img" });
  const words = make("figcaption", { class: "small faint" });
  const element = make("figure", { class: "map" }, canvas, words);
  const show = (shares, number) => {
    paint(canvas, (patch) => [heat(shares[patch]), 255]);
    const best = shares.indexOf(Math.max(...shares));
    const where = `row ${Math.floor(best / columns) + 1}, column ${(best % columns) + 1}`;
    canvas.setAttribute("aria-label", `${set.name}: most often kept is ${where}, in ${percent(shares[best])} of the tickets`);
    words.textContent = caption(number);
  };
  return { element, show };
}

/** Shares [N] over some images, and of how many: those that have the view. */
function shares(set, some) {
  const found = some.map((image) => ranksAt(set, image)).filter(Boolean);
  const sums = new Array(count).fill(0), kept = keptOf(set);
  for (const ranks of found) for (let patch = 0; patch < count; patch++) sums[patch] += ranks[patch] < kept;
  return [sums.map((sum) => sum / Math.max(1, found.length)), found.length];
}

/** A class: its name and maps at the left, its cards beside them. */
function makeBlock(name, members) {
  const cards = members.map(makeCard);
  const maps = data.sets.map((set) => makeMap(set, () => (data.sets.length > 1 ? set.name : "")));
  const said = make("p", { class: "faint small" });
  const element = make("section", { class: "row" },
    make("div", { class: "about" }, make("h2", { text: name === "-" ? "No class" : name }), said,
      make("div", { class: "maps" }, ...maps.map((map) => map.element))),
    make("ul", { class: "cards" }, ...cards.map((card) => card.element)));
  const show = () => {
    const visible = cards.filter((card) => !card.element.hidden);
    element.hidden = visible.length === 0;
    said.textContent = images(visible.length);
    visible.forEach((card) => card.show());
    data.sets.forEach((set, i) => maps[i].show(...shares(set, visible.map((card) => card.image))));
  };
  return { element, cards, show };
}

const groups = new Map(); // class -> numbers of its images; Map.groupBy is too new for some browsers
for (const [image, { class: name }] of data.images.entries()) {
  if (!groups.has(name)) groups.set(name, []);
  groups.get(name).push(image);
}
const blocks = [...groups].map(([name, members]) => makeBlock(name, members));
byId("classes").append(...blocks.map((block) => block.element));

// ---- All classes ---------------------------------------------------------------------------------------------------------

const overall = (() => {
  const place = document.querySelector("#overall .maps");
  const live = data.sets.map((set) => makeMap(set, (number) => `${set.name}: the ${images(number)} below, ${keptOf(set)} patches`));
  const whole = data.sets.map((set) => makeMap(set, () => `${set.name}: all ${images(set.samples)}, view 0, ${set.k} patches as mined`));
  const figures = make("div", { class: "scroll" });
  data.sets.forEach((set, i) => {
    place.append(live[i].element);
    if (set.samples === data.images.length) return; // it would be the same map
    place.append(whole[i].element);
    whole[i].show(set.frequency, set.samples);
  });
  if (data.sets.length > 1) place.append(figures);
  paint(byId("legend"), (i) => [heat(i / 63), 255]);

  const mean = (numbers) => (numbers.length ? (numbers.reduce((a, b) => a + b, 0) / numbers.length).toFixed(3) : "-");
  const line = (first, set, some) => {
    const found = some.map((image) => agreement(first, set, image)).filter(Boolean);
    const [ka, kb] = [keptOf(first), keptOf(set)], common = (ka * kb) / count; // of two random tickets
    return [
      [`${first.name} and ${set.name}`, `${found.length}`, mean(found.map((f) => f.overlap)), mean(found.map((f) => f.iou))],
      ["two at random", "", (common / Math.min(ka, kb)).toFixed(3), (common / (ka + kb - common)).toFixed(3)],
    ];
  };
  return (some) => {
    data.sets.forEach((set, i) => live[i].show(...shares(set, some)));
    const lines = data.sets.slice(1).flatMap((set) => line(data.sets[0], set, some));
    figures.replaceChildren(table(["mean of these tickets", "images", "overlap", "IoU"], lines, [1, 2, 3]));
  };
})();

// ---- One image, large ----------------------------------------------------------------------------------------------------

const detail = byId("detail");
const large = data.sets.map((set) => {
  const tile = makeTile();
  const mark = make("span", { class: "mark", hidden: "" });
  const caption = make("figcaption", { class: "small" });
  tile.element.append(mark);
  tile.element.tabIndex = 0;
  tile.element.setAttribute("role", "img");
  byId("detail-tiles").append(make("figure", {}, tile.element, caption));
  return { set, tile, mark, caption };
});
let pointed = null; // the patch under the pointer

function visibleImages() {
  return blocks.flatMap((block) => block.cards.filter((card) => !card.element.hidden).map((card) => card.image));
}

function openDetail(image) {
  state.open = image;
  pointed = null;
  showDetail();
  if (!detail.open) detail.showModal();
}

function showDetail() {
  const image = data.images[state.open];
  byId("detail-title").textContent = image.key;
  const [top, left, height, width, flip] = data.sets[0].boxes[state.open][Math.min(state.view, data.sets[0].shown - 1)];
  byId("detail-said").textContent =
    `${image.class === "-" ? "No class" : image.class}; ${image.size.join(" x ")} px; view ${state.view}:`
    + ` ${width} x ${height} px at ${left}, ${top}${flip ? ", flipped" : ""}; ${image.source}`;
  for (const { set, tile, caption } of large) {
    tile.show(set, state.open);
    const found = set === data.sets[0] ? null : agreement(data.sets[0], set, state.open);
    const more = found ? `; overlap ${found.overlap.toFixed(3)}, IoU ${found.iou.toFixed(3)}` : "";
    caption.textContent = `${data.sets.length > 1 ? `${set.name}: ` : ""}${keptOf(set)} of ${count} patches${more}`;
    tile.element.setAttribute("aria-label", `${set.name}, ${image.key}; arrow keys go from patch to patch`);
  }
  showPatch();
}

/** The rank of the patch that is pointed at, in every set. */
function showPatch() {
  for (const { mark } of large) {
    mark.hidden = pointed === null;
    mark.style.left = `${(100 * (pointed % columns)) / columns}%`;
    mark.style.top = `${(100 * Math.floor(pointed / columns)) / rows}%`;
  }
  if (pointed === null) {
    byId("patch").textContent = "Point at a patch to see its rank.";
    return;
  }
  const ranks = data.sets.map((set) => {
    const found = ranksAt(set, state.open);
    return found ? `${data.sets.length > 1 ? `${set.name} ` : ""}rank ${found[pointed] + 1} of ${count}` : `${set.name}: no such view`;
  });
  byId("patch").textContent = `Row ${Math.floor(pointed / columns) + 1}, column ${(pointed % columns) + 1}: ${ranks.join("; ")}`;
}

function step(by) {
  const some = visibleImages();
  openDetail(some[(some.indexOf(state.open) + by + some.length) % some.length]);
}

for (const { tile } of large) {
  tile.element.addEventListener("pointermove", (event) => {
    const box = tile.element.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
    const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
    if (column < 0 || row < 0 || column >= columns || row >= rows) return;
    pointed = row * columns + column;
    showPatch();
  });
  tile.element.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!steps) return;
    event.preventDefault();
    event.stopPropagation(); // or the dialog would go to another image
    const start = pointed ?? Math.floor(rows / 2) * columns + Math.floor(columns / 2);
    const row = Math.min(rows - 1, Math.max(0, Math.floor(start / columns) + steps[0]));
    const column = Math.min(columns - 1, Math.max(0, (start % columns) + steps[1]));
    pointed = row * columns + column;
    showPatch();
  });
}
detail.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
});
detail.addEventListener("click", (event) => { if (event.target === detail) detail.close(); }); // beside it
byId("previous").addEventListener("click", () => step(-1));
byId("next").addEventListener("click", () => step(1));
byId("close").addEventListener("click", () => detail.close());

// ---- What failed, what the sets are --------------------------------------------------------------------------------------

for (const set of data.sets) {
  const name = data.sets.length > 1 ? `${set.name}: ` : "";
  if (!set.failed) {
    byId("failures").append(make("p", { class: "faint", text: `${name}nothing; all ${images(set.samples)} of split ${data.split} were.` }));
    continue;
  }
  const reasons = Object.entries(set.reasons).map(([reason, number]) => `${number} x ${reason}`).join("; ");
  const listed = set.failures.length < set.failed ? `; the first ${set.failures.length} are listed` : "";
  byId("failures").append(
    make("p", { text: `${name}${set.failed} of ${images(set.failed + set.samples)}: ${reasons}${listed}.` }),
    make("div", { class: "scroll" }, table(["key", "file", "why"], set.failures.map((each) => [each.key, each.source, each.error]))));
}

byId("sets").append(table(
  ["", ...data.sets.map((set) => set.name)],
  [
    ["Selector", (set) => set.selector],
    ["Ticket", (set) => `K = ${set.k} of ${count} patches (${percent(set.k / count)})`],
    ["Patch grid", () => `${rows} x ${columns}`],
    ["Split", (set) => `${data.split}: ${images(set.samples)}, ${set.failed} failed`],
    ["Views", (set) => (set.shown < set.views ? `the first ${set.shown} of ${set.views}` : `${set.views}`)],
    ["Images", (set) => (set.stored < count ? `${set.images}: the best ${set.stored} patches; gray: not stored` : set.images)],
    ["set_id", (set) => set.set_id],
  ].map(([head, cell]) => [head, ...data.sets.map(cell)])));

// ---- Controls ------------------------------------------------------------------------------------------------------------

function show() {
  const main = document.querySelector("main");
  main.dataset.mode = state.mode;
  const kept = [...new Set(data.sets.map(keptOf))];
  const share = kept.length === 1 ? ` (${percent(kept[0] / count)})` : "";
  byId("k-said").textContent = `K = ${kept.join(" and ")} of ${count}${share}`;
  byId("k").setAttribute("aria-valuetext", byId("k-said").textContent);
  byId("mined").disabled = data.sets.every((set) => keptOf(set) === set.k);
  for (const block of blocks) block.show();
  const visible = visibleImages();
  byId("overall").hidden = visible.length === 0;
  if (visible.length) overall(visible);
  byId("count").textContent = visible.length < data.images.length ? `${visible.length} of ${images(data.images.length)}` : images(visible.length);
  if (detail.open) showDetail();
}

let waiting = false;
/** Draws at most once a frame, however fast the slider moves. */
function showSoon() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    show();
  });
}

document.documentElement.style.setProperty("--sets", data.sets.length);
document.documentElement.style.setProperty("--columns", columns);
document.documentElement.style.setProperty("--rows", rows);
document.documentElement.style.setProperty("--ratio", columns / rows);
document.querySelector("main").dataset.sets = Math.min(3, data.sets.length);
const first = data.sets[0];
byId("lead").textContent =
  data.sets.map((set) => `${data.sets.length > 1 ? `${set.name}: ` : ""}${set.selector}\n`).join("")
  + `${data.images.length} of ${images(first.samples)} in split ${data.split}`;

byId("k").max = count;
byId("k").value = first.k;
byId("k").addEventListener("input", () => {
  state.k = byId("k").valueAsNumber;
  showSoon();
});
byId("mined").addEventListener("click", () => {
  state.k = null;
  byId("k").value = first.k;
  show();
  byId("k").focus(); // a button that was just disabled would lose it
});
for (let view = 0; view < Math.max(...data.sets.map((set) => set.shown)); view++)
  byId("view").append(make("option", { value: view, text: view ? `${view}` : "0, the center" }));
byId("view").addEventListener("change", () => {
  state.view = Number(byId("view").value);
  show();
});
for (const radio of document.querySelectorAll("input[name=mode]"))
  radio.addEventListener("change", () => {
    state.mode = radio.value;
    show();
  });
byId("find").addEventListener("input", () => {
  const wanted = byId("find").value.trim().toLowerCase();
  for (const block of blocks) for (const card of block.cards) card.element.hidden = !card.text.includes(wanted);
  showSoon();
});
show();
