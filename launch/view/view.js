// What is shown is in the address: #documents/FOLDER[/NUMBER] or #packs/SEGMENT/BLOCK/ROW. Keys and clicks change it.

import { List, showDocument } from "./documents.js";
import { call, count, element, mark, problem } from "./elements.js";
import { showPack } from "./packs.js";

const TERM = /(?:[^\s"]+|"[^"]*")+/g;
const byId = (id) => document.getElementById(id);
const [documents, packs, page, query, chooser] = ["documents", "packs", "document", "query", "folder"].map(byId);
const selects = [...document.querySelectorAll("[data-facet]")];
const state = { folders: [], segments: [], tokens: false, folder: null, number: null, segment: 0, block: 0, row: 0, turn: 0 };
const list = new List(openDocument);

function openDocument(number) {
  const last = state.folders[state.folder].samples - 1;
  if (last < 0) return;
  const chosen = Math.max(0, Math.min(last, number));
  location.hash = `#documents/${state.folder}/${chosen}`;
  list.mark(chosen);  // the browser tells of the new address later; a key that comes before counts from here
}

function openPack(segment, block, row) {
  const last = state.segments.length - 1;
  Object.assign(state, { segment: Math.max(0, Math.min(last, segment)), block: Math.max(0, block), row: Math.max(0, row) });
  location.hash = `#packs/${state.segment}/${state.block}/${state.row}`;
}

async function route() {
  const turn = ++state.turn;
  const fresh = () => turn === state.turn;
  const [view, ...numbers] = location.hash.slice(1).split("/");
  const [first, second, third] = numbers.map((text) => (/^\d{1,15}$/.test(text) ? Number(text) : null));
  const inPacks = view === "packs" && state.segments.length > 0;
  packs.hidden = !inPacks;
  documents.hidden = inPacks;
  mark(byId("tab-packs"), inPacks);
  mark(byId("tab-documents"), !inPacks);
  if (inPacks) {
    Object.assign(state, { segment: first ?? 0, block: second ?? 0, row: third ?? 0 });
    await showPack(packs, state, state, openPack, fresh);
    return;
  }
  const folder = state.folders[first] ? first : 0;
  if (folder !== state.folder) enterFolder(folder);
  state.number = second ?? null;
  document.body.classList.toggle("reading", state.number !== null);
  byId("tab-documents").href = state.number === null ? `#documents/${folder}` : location.hash;
  if (state.number === null) {
    page.replaceChildren(element("p", { class: "about" }, "Choose a document from the list, or press j."));
    return;
  }
  list.mark(state.number);
  await showDocument(page, folder, state.number,
    { tokens: state.tokens, block: state.segments.length ? { ...state } : null }, openDocument, fresh);
  if (fresh()) page.scrollTop = 0;
}

function enterFolder(folder) {
  state.folder = folder;
  chooser.value = String(folder);
  page.replaceChildren();
  list.current = undefined;
  restartList();
  countFacets(folder);
}

function restartList() {
  for (const select of selects) select.value = facetOf(select.dataset.facet);
  return list.restart(state.folder, state.folders[state.folder].samples, query.value);
}

const terms = () => query.value.match(TERM) ?? [];
function facetOf(name) {
  const term = terms().find((one) => one.startsWith(`${name}:`));
  return term ? term.slice(name.length + 1).replaceAll('"', "") : "";
}

function setFacet(name, value) {
  const others = terms().filter((one) => !one.startsWith(`${name}:`));
  const term = /\s/.test(value) ? `${name}:"${value}"` : `${name}:${value}`;
  query.value = [...others, ...(value ? [term] : [])].join(" ");
  restartList();
}

// The server counts a few shards at each call; the choices fill up meanwhile.
async function countFacets(folder) {
  for (;;) {
    let facets;
    try {
      facets = await call("facets", { folder });
    } catch {
      return;  // the list says what is wrong with the folder
    }
    if (folder !== state.folder) return;
    for (const select of selects) {
      const choices = facets.counts[select.dataset.facet].filter(([value]) => value);
      select.replaceChildren(element("option", { value: "" }, "all"), ...choices.map(([value, samples]) =>
        element("option", { value, selected: value === facetOf(select.dataset.facet) }, `${value} (${count(samples)})`)));
    }
    if (facets.done) return;
  }
}

function playOrPause() {
  const sounds = [...page.querySelectorAll("audio")];
  const sound = sounds.find((one) => !one.paused) ?? sounds[0];
  if (sound?.paused) sound.play();
  else sound?.pause();
}

const inPacks = () => !packs.hidden;
const step = (by) => (inPacks() ? openPack(state.segment, state.block, state.row + by) : list.step(by));
const KEYS = {
  j: () => step(1),
  k: () => step(-1),
  "/": () => { location.hash = inPacks() ? `#documents/${state.folder ?? 0}` : location.hash; query.focus(); query.select(); },
  t: () => { state.tokens = !state.tokens; route(); },
  " ": playOrPause,
  g: () => (inPacks() ? packs : page).querySelector(".goto")?.select(),
  r: () => [...(inPacks() ? packs : page).querySelectorAll(".stepper button")].at(-1)?.click(),
  "[": () => inPacks() && openPack(state.segment, state.block - 1, 0),
  "]": () => inPacks() && openPack(state.segment, state.block + 1, 0),
  "{": () => inPacks() && openPack(state.segment - 1, 0, 0),
  "}": () => inPacks() && openPack(state.segment + 1, 0, 0),
  d: () => { location.hash = byId("tab-documents").hash; },
  p: () => state.segments.length && openPack(state.segment, state.block, state.row),
  "?": () => byId("keys").showModal(),
  Escape: () => { if (!inPacks()) location.hash = `#documents/${state.folder}`; },
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("keys").open) return;
  const typing = event.target.matches("input, select, textarea");
  if (typing && event.key === "Escape") event.target.blur();
  if (typing || !(event.key in KEYS)) return;
  // A space on a button, a link or the player is theirs.
  if (event.key === " " && event.target.matches("button, a, audio, summary")) return;
  event.preventDefault();
  KEYS[event.key]();
});

async function start() {
  const { folders, segments } = await call("folders", {});
  Object.assign(state, { folders, segments });
  byId("tab-packs").hidden = !segments.length;
  chooser.replaceChildren(...folders.map((folder, number) =>
    element("option", { value: number, title: folder.location }, `${folder.name} (${count(folder.samples)})`)));
  chooser.addEventListener("change", () => { location.hash = `#documents/${chooser.value}`; });
  for (const select of selects) select.addEventListener("change", () => setFacet(select.dataset.facet, select.value));
  let waiting;
  query.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(restartList, 250); });
  byId("search").addEventListener("submit", (event) => { event.preventDefault(); query.blur(); });
  byId("show-keys").addEventListener("click", KEYS["?"]);
  window.addEventListener("hashchange", route);
  await route();
}

start().catch((error) => page.replaceChildren(problem(error)));
