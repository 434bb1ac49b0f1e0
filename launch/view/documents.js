// The list of documents, its search, and one document in full.

import { call, colour, count, element, facts, mark, problem, seconds, shape, size, stepper } from "./elements.js";

const WANTED = 30;  // rows that a search goes on for by itself

export class List {
  constructor(open) {
    this.open = open;
    this.folder = 0;
    this.query = "";
    this.numbers = [];
    this.next = 0;
    this.node = document.getElementById("list");
    this.status = document.getElementById("status");
    this.button = document.getElementById("more");
    this.button.addEventListener("click", () => this.more());
    new IntersectionObserver((seen) => seen.some((entry) => entry.isIntersecting) && this.more())
      .observe(this.button);
  }

  restart(folder, samples, query) {
    this.stop?.abort();
    Object.assign(this, { folder, samples, query, numbers: [], next: 0, unreadable: 0, busy: false });
    this.node.replaceChildren();
    return this.more();
  }

  // Asks until there are WANTED more rows: each call of the server has a time limit and says where it stopped.
  async more() {
    if (this.busy || this.next === null) return;
    const stop = this.stop = new AbortController();
    const enough = this.numbers.length + WANTED;
    this.busy = true;
    this.button.hidden = true;
    try {
      while (this.next !== null && this.numbers.length < enough) {
        this.say("searching");
        const asked = { folder: this.folder, query: this.query, start: this.next };
        const found = await call("samples", asked, stop.signal);
        this.next = found.next;
        this.unreadable += found.unreadable;
        for (const sample of found.samples) this.add(sample);
      }
      this.say(this.next === null ? "all searched" : "");
    } catch (error) {
      if (error.name === "AbortError") return;
      this.status.replaceChildren(problem(error));
      this.next = null;
    }
    this.busy = false;
    this.button.hidden = this.next === null;
  }

  say(word) {
    const searched = this.next === null ? this.samples : this.next;
    const passed = this.unreadable ? `, ${count(this.unreadable)} damaged passed over` : "";
    const shown = `${count(this.numbers.length)} shown, ${count(searched)} of ${count(this.samples)} searched`;
    const nothing = this.next === null && !this.numbers.length ? "Nothing found. " : "";
    this.status.replaceChildren(nothing + shown + passed + (word === "searching" ? " …" : ""));
  }

  add(sample) {
    this.numbers.push(sample.number);
    const media = Object.entries(sample.modalities).map(([name, parts]) => (parts > 1 ? `${parts} ${name}` : name));
    const about = [`#${sample.number}`, sample.corpus, sample.language, media.join(" + ")].filter(Boolean).join(" · ");
    const thumbnail = sample.picture === null || sample.damage ? element("span", { class: "thumbnail" })
      : element("img", { class: "thumbnail", alt: "", loading: "lazy",
        src: `/thumbnail?folder=${this.folder}&sample=${sample.number}&part=${sample.picture}`,
        error: (event) => event.target.replaceWith(element("span", { class: "thumbnail" })) });
    this.node.append(element("li", {},
      element("a", { href: `#documents/${this.folder}/${sample.number}`, "data-number": sample.number },
        thumbnail,
        element("span", { class: "entry" },
          element("span", { class: sample.damage ? "excerpt problem" : "excerpt", dir: "auto" },
            sample.damage ? `damaged: ${sample.damage}` : sample.excerpt || "(no text)"),
          element("span", { class: "about", dir: "auto" }, about)))));
    if (sample.number === this.current) this.mark(sample.number);
  }

  mark(number) {
    this.current = number;
    for (const link of this.node.querySelectorAll("a")) {
      const here = Number(link.dataset.number) === number;
      mark(link, here);
      if (here) link.scrollIntoView({ block: "nearest" });
    }
  }

  // The document after or before the current one in the list; the first of a list that the current one is not in.
  async step(by) {
    const place = this.numbers.indexOf(this.current);
    if (place < 0 && !this.query && this.current !== undefined) return this.open(this.current + by);
    if (place + by >= this.numbers.length) await this.more();
    const number = this.numbers[Math.max(0, place + by)];
    return number === undefined ? undefined : this.open(number);
  }
}

// fresh: whether this document is still the one that is asked for when its content is there.
// block: segment and number of the one whose packs are looked at, null without a config.
export async function showDocument(node, folder, number, { tokens, block }, open, fresh) {
  const whole = { folder, sample: number, whole: 1 };
  async function load(asked) {
    const content = await call("document", asked);
    if (!fresh()) return;
    const parts = content.parts.map((part) => shownPart(part, folder, number, tokens, () => load(whole)));
    node.replaceChildren(
      element("a", { class: "back", href: `#documents/${folder}` }, "← list"),
      stepper("document", number, content.samples, open),
      element("h1", { dir: "auto" }, content.id),
      element("p", { class: "about", dir: "auto" }, `${content.corpus || "no corpus"} · ${content.place}`),
      content.damage ? problem({ message: `damaged: ${content.damage}` }) : "",
      block === null ? "" : packsOf(folder, number, block),
      ...parts,
      content.left_out
        ? element("button", { type: "button", click: () => load(whole) }, `${count(content.left_out)} more parts`) : "",
      facts("Labels", content.labels) ?? "",
      facts("Source", [...content.source, ["key", content.key]]) ?? "",
      element("details", {}, element("summary", {}, "JSON as stored"), element("pre", { dir: "auto" }, content.json)));
  }
  try {
    await load({ folder, sample: number });
  } catch (error) {
    if (!fresh()) return;
    node.replaceChildren(element("a", { class: "back", href: `#documents/${folder}` }, "← list"), problem(error));
  }
}

function packsOf(folder, number, { segment, block, segments }) {
  const name = (segments.length > 1 ? `segment ${count(segment)}, ` : "") + `block ${count(block)}: `;
  const line = element("p", { class: "about" }, `${name}…`);
  call("packs_of", { folder, sample: number, segment, block }).then(({ rows }) => {
    const links = rows.flatMap((row, place) =>
      [place ? ", " : "", element("a", { href: `#packs/${segment}/${block}/${row}` }, `pack ${count(row)}`)]);
    line.replaceChildren(name, ...(links.length ? links : ["in none of its packs"]));
  }).catch((error) => line.replaceChildren(problem(error)));
  return line;
}

function shownPart(part, folder, number, tokens, showWhole) {
  const address = `folder=${folder}&sample=${number}&part=${part.part}`;
  const head = [part.role, part.modality, part.member].filter(Boolean).join(" · ");
  const body = part.modality === "text" ? shownText(part, tokens, showWhole)
    : part.problem ? [problem({ message: part.problem })]
    : part.kind === "image" ? [element("img", { src: `/medium?${address}`, alt: part.alt ?? "", loading: "lazy" })]
    : part.kind === "audio" ? [player(address, part)]
    : [element("a", { href: `/medium?${address}`, download: "" }, "download: not shown here")];
  const about = part.modality === "text" ? [] : [
    part.info.width ? `${part.info.width} × ${part.info.height} px` : "",
    part.ms ? `${seconds(part.ms)} at ${count(part.info.rate)} Hz` : "",
    part.t_ms ? `from ${seconds(part.t_ms[0])} to ${seconds(part.t_ms[1])}` : "",
    size(part.bytes),
  ].filter(Boolean);
  return element("section", { class: `part edge-${colour(part.modality)}` },
    element("h2", { dir: "auto" }, head + (part.tokens ? `, ${count(part.tokens.length)} tokens` : "")),
    ...body,
    part.alt ? element("p", { class: "alt", dir: "auto" }, `alt: ${part.alt}`) : "",
    about.length ? element("p", { class: "about" }, about.join(" · ")) : "");
}

function shownText(part, tokens, showWhole) {
  const text = element("p", { class: "text", dir: "auto" });
  if (tokens && part.tokens) {
    text.append(...part.tokens.map(([id, words]) => element("span", { class: "token", title: `token ${id}` }, words)));
    text.classList.add("tokens");
  } else {
    text.append(part.text);
  }
  if (!part.left_out) return [text];
  return [text, element("button", { type: "button", click: showWhole }, `${count(part.left_out)} more characters`)];
}

// A sound: its waveform, which is a picture to click on, and the browser's own player, which has the keys.
function player(address, part) {
  const audio = element("audio", { controls: true, preload: "metadata", src: `/medium?${address}` });
  const head = shape("line", { y1: 0, y2: 256, x1: 0, x2: 0, class: "playhead" });
  const drawing = shape("svg", { class: "waveform", viewBox: "0 0 600 256", preserveAspectRatio: "none", role: "img",
    "aria-label": `waveform of ${seconds(part.ms)}` }, head);
  drawing.addEventListener("click", (event) => {
    const box = drawing.getBoundingClientRect();
    audio.currentTime = ((event.clientX - box.left) / box.width) * (audio.duration || 0);
  });
  const follow = () => {
    const x = audio.duration ? (600 * audio.currentTime) / audio.duration : 0;
    head.setAttribute("x1", x);
    head.setAttribute("x2", x);
    if (!audio.paused) requestAnimationFrame(follow);
  };
  for (const name of ["play", "seeked", "pause"]) audio.addEventListener(name, follow);
  const box = element("div", { class: "sound" }, drawing, audio);
  call("waveform", new URLSearchParams(address)).then(({ peaks }) => {
    const wide = 600 / peaks.length;
    const path = peaks.map(([low, high], place) => {
      const top = 128 - Math.max(high, low + 1);
      return `M${(place + 0.5) * wide} ${top}V${128 - low}`;
    });
    drawing.prepend(shape("path", { d: path.join(""), "stroke-width": Math.max(wide, 1) }));
  }).catch((error) => box.prepend(problem(error)));
  return box;
}
