// One pack of the plan: its tokens in a strip, what they attend to, and the pieces it is made of.

import { call, colour, count, element, problem, shape, stepper } from "./elements.js";

const percent = (part, whole) => `${((100 * part) / whole).toFixed(1)} %`;

// place: segment, block and row. go(segment, block, row) changes it. fresh: whether it is still the one asked for.
export async function showPack(node, { segment, block, row }, { folders, segments }, go, fresh) {
  const chooser = segments.length > 1 ? segmentChooser(segments, segment, go) : "";
  try {
    if (!await reached(node, chooser, segment, fresh)) return;
    const [pack, whole] = await Promise.all(
      [call("pack", { segment, block, row }), call("block", { segment, block })]);
    if (!fresh()) return;
    show(node, chooser,
      element("form", { class: "stepper" },
        element("button", { type: "button", disabled: block <= 0, click: () => go(segment, block - 1, 0), "aria-label": "previous block" }, "←"),
        ` block ${count(block)} `,
        element("button", { type: "button", click: () => go(segment, block + 1, 0), "aria-label": "next block" }, "→")),
      stepper("pack", row, pack.rows, (to) => go(segment, block, to)),
      element("h1", {}, `Pack ${count(row)}: ${count(pack.tokens)} of ${count(pack.sequence_length)} tokens, `
        + percent(pack.tokens, pack.sequence_length)),
      element("p", { class: "about" }, blockWords(whole)),
      isPast(whole, row) ? element("p", { class: "problem" },
        `No step takes this pack: segment ${count(segment + 1)} takes over before it.`) : "",
      legend(pack.stretches),
      strip(pack),
      element("div", { class: "pack" }, matrix(pack), pieces(pack, folders, node)));
  } catch (error) {
    if (!fresh()) return;
    show(node, chooser,
      element("form", { class: "stepper" }, element("button", { type: "button", click: () => go(segment, 0, 0) }, "first pack")),
      problem(error));
  }
}

// Show the choice of segments and more; who was choosing goes on choosing.
function show(node, chooser, ...content) {
  const choosing = document.activeElement?.id === "segment";
  node.replaceChildren(chooser, ...content);
  if (choosing) node.querySelector("#segment")?.focus();
}

// The server walks the steps before a segment a moment at each call, and says how far it is.
async function reached(node, chooser, segment, fresh) {
  for (;;) {
    const { there, step, steps } = await call("segment", { segment });
    if (!fresh() || there) return fresh();
    show(node, chooser, element("p", { class: "about", role: "status" },
      `Segment ${count(segment)} begins where the steps before it end: step ${count(step)} of ${count(steps)} is planned`));
  }
}

function segmentChooser(segments, chosen, go) {
  const options = segments.map((one, number) => {
    const steps = one.last_step === null
      ? `from step ${count(one.first_step)}` : `steps ${count(one.first_step)} to ${count(one.last_step)}`;
    return element("option", { value: number, selected: number === chosen },
      `${count(number)}: ${steps}, ${count(one.sequence_length)} tokens a pack`);
  });
  const select = element("select", { id: "segment", change: () => go(Number(select.value), 0, 0) }, options);
  return element("form", { class: "stepper" }, element("label", {}, "plan segment ", select));
}

const isPast = ({ block, end }, row) => end !== null && (block > end[0] || (block === end[0] && row >= end[1]));

function blockWords(block) {
  const total = block.row_tokens.reduce((sum, tokens) => sum + tokens, 0);
  const fill = percent(total, block.row_tokens.length * block.sequence_length);
  const kinds = Object.entries(block.tokens).map(([name, tokens]) => `${count(tokens)} ${name}`);
  const left = Object.entries(block.left_out).map(([reason, times]) => `${count(times)} × ${reason}`);
  return `Block ${count(block.block)}: ${count(block.rows)} packs of ${count(block.samples)} samples, ${fill} full; tokens: `
    + kinds.join(", ") + (left.length ? `; left out: ${left.join(", ")}` : "");
}

function legend(stretches) {
  const names = [...new Set(stretches.map((stretch) => stretch.modality))];
  return element("p", { class: "legend" },
    names.map((name) => [element("span", { class: `swatch back-${colour(name)}` }), `${name}  `]));
}

// "block" where every token sees all of [lo, hi), "causal" where each sees [lo, itself].
function words(stretch, pack) {
  const sees = stretch.causal ? `each sees from ${stretch.lo} to itself` : `each sees ${stretch.lo} to ${stretch.hi - 1}`;
  const piece = pack.pieces[stretch.piece];
  return `${stretch.modality}, tokens ${stretch.start} to ${stretch.end - 1}, ${sees}; piece ${stretch.piece}: `
    + `${piece.source} #${piece.sample}${piece.alone ? ", alone" : ""}`;
}

function strip(pack) {
  const bars = pack.stretches.map((stretch) => shape("rect",
    { x: stretch.start, y: 0, width: stretch.end - stretch.start, height: 1, class: `f-${colour(stretch.modality)}`,
      "data-piece": stretch.piece },
    shape("title", {}, words(stretch, pack))));
  const borders = pack.stretches.filter((stretch, place) => place && stretch.piece !== pack.stretches[place - 1].piece)
    .map((stretch) => shape("line", { x1: stretch.start, x2: stretch.start, y1: 0, y2: 1, class: "border" }));
  return shape("svg", { class: "strip", viewBox: `0 0 ${pack.sequence_length} 1`, preserveAspectRatio: "none",
    role: "img", "aria-label": `${pack.pieces.length} pieces from left to right` }, ...bars, ...borders);
}

function matrix(pack) {
  const length = pack.sequence_length;
  const areas = pack.stretches.map((stretch) => {
    const { start, end, lo, hi } = stretch;
    const corners = stretch.causal
      ? [[lo, start], [start, start], [end, end], [lo, end]]
      : [[lo, start], [hi, start], [hi, end], [lo, end]];
    return shape("polygon", { points: corners.map((corner) => corner.join(",")).join(" "),
      class: `f-${colour(stretch.modality)}`, "data-piece": stretch.piece }, shape("title", {}, words(stretch, pack)));
  });
  const drawing = shape("svg", { class: "matrix", viewBox: `0 0 ${length} ${length}`, role: "img",
    "aria-label": "attention: rows are queries from top to bottom, columns the keys they see" }, ...areas);
  return element("figure", {}, element("figcaption", {}, "Attention ",
    element("span", {}, "down: queries; across: the keys they see")), drawing);
}

function pieces(pack, folders, node) {
  const light = (piece, on) => node.querySelectorAll(`[data-piece="${piece}"]`)
    .forEach((area) => area.classList.toggle("lit", on));
  const rows = pack.pieces.map((piece, number) => {
    const folder = folders.findIndex((entry) => entry.name === piece.source);
    const name = element("a", { href: `#documents/${folder}/${piece.sample}`, dir: "auto" }, piece.key);
    return element("tr", {
      mouseenter: () => light(number, true), mouseleave: () => light(number, false),
      focusin: () => light(number, true), focusout: () => light(number, false),
    },
    element("td", {}, String(number)), element("td", { class: "words" }, piece.source), element("td", { class: "words" }, name),
    element("td", {}, String(piece.epoch)),
    element("td", {}, (piece.alone ? "alone" : `${count(piece.first)} – ${count(piece.end)}`)
      + (piece.carried ? ", carried over" : "")));
  });
  const heads = [["piece"], ["source", "words"], ["document", "words"], ["epoch"], ["its tokens"]]
    .map(([name, kind]) => element("th", { scope: "col", class: kind }, name));
  return element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "pieces" },
    element("table", {}, element("thead", {}, element("tr", {}, heads)), element("tbody", {}, rows)));
}
