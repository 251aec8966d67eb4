// Inputs for settings, described by Python: native elements, each with a label, its help and its error.
import { make } from "./film.js";

const MADE = {
  check: (spec, parent) => make("input", "", parent, { type: "checkbox" }),
  select: (spec, parent) => make("select", "tfnb-input", parent),
  area: (spec, parent) => make("textarea", "tfnb-input", parent, { rows: 2 }),
  range: (spec, parent) => make("input", "tfnb-range", parent, { type: "range", min: spec.least, max: spec.most, step: spec.step }),
  number: (spec, parent) => make("input", "tfnb-input tfnb-number", parent, { type: "text", inputmode: "decimal" }),
  text: (spec, parent) => make("input", "tfnb-input", parent, { type: "text" }),
};

// An empty number stands for «automatic», which Python calls None; what is no number goes to Python, which says why.
export const readNumber = (text) => {
  const trimmed = text.trim();
  if (trimmed === "") return null;
  const number = Number(trimmed.replace(",", "."));
  return Number.isFinite(number) ? number : trimmed;
};
export const shownNumber = (value) => (value === null || value === undefined ? "" : `${value}`);
export const roundTo = (value, step) => Number((Math.round(value / step) * step).toFixed(6));

function field(spec, model, parent, id) {
  const row = make("div", `tfnb-field tfnb-field-${spec.kind}`, parent);
  row.dataset.name = spec.name;
  const label = make("label", "tfnb-label", row, { for: id });
  label.textContent = spec.label;
  const line = make("div", "tfnb-line", row);
  const input = MADE[spec.kind](spec, line);
  Object.assign(input, { id, placeholder: spec.placeholder ?? "", title: spec.help ?? "" });
  input.spellcheck = spec.kind === "area";
  const output = spec.kind === "range" ? make("output", "tfnb-count", line, { for: id }) : null;
  if (spec.kind === "select")
    for (const [text, value] of spec.choices) make("option", "", input, { value }).textContent = text;
  if (spec.suggestions) {
    const list = make("datalist", "", line, { id: `${id}-list` });
    for (const value of spec.suggestions) make("option", "", list, { value });
    input.setAttribute("list", list.id);
  }
  const help = make("div", "tfnb-help", row, { id: `${id}-help` });
  help.textContent = spec.shown ? spec.help : "";
  help.hidden = !spec.shown;
  const error = make("div", "tfnb-field-error", row, { id: `${id}-error`, role: "alert" });
  input.setAttribute("aria-describedby", `${id}-help ${id}-error`);

  const send = (content) => model.send(content);
  if (spec.action) {
    const button = make("button", "tfnb-button", line, { type: "button", "aria-label": spec.action.label, title: spec.action.label });
    button.textContent = spec.action.text ?? spec.action.label;
    button.addEventListener("click", () => {
      take();
      send({ action: spec.action.name });
    });
  }

  const written = () => {
    if (spec.kind === "check") return input.checked;
    if (spec.kind === "range") return Number(input.value);
    return spec.kind === "number" ? readNumber(input.value) : input.value;
  };
  function take() {
    const values = model.get("values");
    if (values[spec.name] === written()) return;
    model.set("values", { ...values, [spec.name]: written() });
    model.save_changes();
  }
  input.addEventListener(spec.kind === "range" || spec.kind === "area" ? "input" : "change", () => {
    if (output) output.textContent = input.value;
    take();
  });
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.ctrlKey && !event.metaKey && spec.action && input.tagName === "INPUT") {
      take();
      send({ action: spec.action.name });
    }
  });

  function show() {
    const value = model.get("values")[spec.name];
    if (spec.kind === "check") input.checked = Boolean(value);
    else if (input !== document.activeElement || written() !== value) input.value = shownNumber(value);
    if (output) output.textContent = shownNumber(value);
    const problem = model.get("errors")[spec.name] ?? "";
    error.textContent = problem;
    error.hidden = !problem;
    input.setAttribute("aria-invalid", Boolean(problem));
    row.hidden = Boolean(spec.when) && !spec.when[1].includes(model.get("values")[spec.when[0]]);
  }
  return show;
}

// Each widget has this module to itself, so a counter would give the forms of a page the same ids.
const unique = () => Math.random().toString(36).slice(2);

function render({ model, el }) {
  const box = make("div", "tfnb-form", el);
  let shows = [];

  function layOut() {
    const open = new Set([...box.querySelectorAll("details[open]")].map((node) => node.dataset.group));
    const focused = box.contains(document.activeElement) ? document.activeElement.closest(".tfnb-field")?.dataset.name : null;
    box.replaceChildren();
    const form = unique();
    const groups = new Map();
    shows = model.get("fields").map((spec, index) => {
      const name = spec.group ?? "";
      if (name && !groups.has(name)) {
        const details = make("details", "tfnb-group", box);
        details.dataset.group = name;
        details.open = open.has(name);
        make("summary", "tfnb-summary", details).textContent = name;
        groups.set(name, details);
      }
      return field(spec, model, groups.get(name) ?? box, `tfnb-${form}-${index}`);
    });
    show();
    if (focused) box.querySelector(`[data-name="${CSS.escape(focused)}"] :is(input, select, textarea)`)?.focus();
  }
  function show() {
    shows.forEach((each) => each());
    for (const details of box.querySelectorAll("details"))
      if (details.querySelector('[aria-invalid="true"]')) details.open = true; // an error must be seen
  }
  const keys = (event) => {
    event.stopPropagation(); // the notebook has its own shortcuts
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    event.target.blur?.(); // what was written counts
    event.target.focus?.();
    model.send({ action: "submit" });
  };
  box.addEventListener("keydown", keys);

  const listeners = { "change:fields": layOut, "change:values": show, "change:errors": show };
  for (const [event, listener] of Object.entries(listeners)) model.on(event, listener);
  layOut();
  model.send({ view: 1 });
  return () => {
    model.send({ view: -1 });
    for (const [event, listener] of Object.entries(listeners)) model.off(event, listener);
  };
}

export default { render };
