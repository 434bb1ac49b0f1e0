// Building blocks of the page. Texts become text nodes, never markup; addresses are made of numbers.

const SVG = "http://www.w3.org/2000/svg";

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity).filter((child) => child != null && child !== ""));
  return node;
}

export function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

export function shape(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

export async function call(name, parameters, signal) {
  const answer = await fetch(`/api/${name}?${new URLSearchParams(parameters)}`, { signal });
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.problem);
  return content;
}

export const count = (number) => number.toLocaleString("en");

export function size(bytes) {
  if (bytes < 1000) return `${bytes} B`;
  return bytes < 1e6 ? `${(bytes / 1e3).toFixed(1)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

export function seconds(ms) {
  const whole = Math.floor(ms / 60000);
  return whole ? `${whole} min ${((ms % 60000) / 1000).toFixed(1)} s` : `${(ms / 1000).toFixed(2)} s`;
}

// The same colour for a modality everywhere: text, image, audio, then what else there is.
const known = ["text", "image", "audio"];
export function colour(modality) {
  if (!known.includes(modality)) known.push(modality);
  return `c${known.indexOf(modality) % 6}`;
}

export function facts(title, pairs) {
  if (!pairs.length) return null;
  const rows = pairs.map(([name, value]) => [element("dt", { dir: "auto" }, name), element("dd", { dir: "auto" }, value)]);
  return element("section", { class: "facts" }, element("h3", {}, title), element("dl", {}, rows));
}

export function problem(error) {
  return element("p", { class: "problem", role: "alert" }, error.message || String(error));
}

export function mark(node, here) {
  if (here) node.setAttribute("aria-current", "true");
  else node.removeAttribute("aria-current");
}

// A stepper over numbered things: previous, number box, next, random.
export function stepper(label, value, total, go) {
  const box = element("input", { type: "number", min: 0, max: total - 1, value, class: "goto", "aria-label": label });
  const form = element("form", { class: "stepper" },
    element("button", { type: "button", disabled: value <= 0, click: () => go(value - 1), "aria-label": `previous ${label}` }, "←"),
    element("label", {}, `${label} `, box, ` of ${count(total)}`),
    element("button", { type: "button", disabled: value >= total - 1, click: () => go(value + 1), "aria-label": `next ${label}` }, "→"),
    element("button", { type: "button", click: () => go(Math.floor(Math.random() * total)) }, "Random"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    go(Math.max(0, Math.min(total - 1, Math.floor(box.valueAsNumber) || 0)));
  });
  return form;
}
