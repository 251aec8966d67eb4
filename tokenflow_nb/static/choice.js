// One of several named values: a list in groups, a slider, or buttons beside each other. All are native inputs, so the
// keyboard and screen readers know them.
const make = (tag, className, parent, attributes = {}) => {
  const node = document.createElement(tag);
  node.className = className;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  parent.append(node);
  return node;
};
// An input inside of its label has the label's text as its name.
const labelled = (box, model) => {
  const label = make("label", "tfnb-choice-label", box);
  make("span", "", label).textContent = model.get("label");
  return label;
};

// Each kind gives how it is built anew, and how it shows the chosen place.
const KINDS = {
  list(box, model, choose) {
    const select = make("select", "tfnb-choice-list", labelled(box, model));
    const groups = model.get("groups");
    let parent = select;
    model.get("options").forEach((text, place) => {
      if (groups[place] && groups[place] !== parent.label) parent = make("optgroup", "", select, { label: groups[place] });
      make("option", "", parent, { value: place }).textContent = text;
    });
    select.addEventListener("change", () => choose(select.selectedIndex));
    return () => (select.selectedIndex = model.get("index"));
  },
  slider(box, model, choose) {
    const last = Math.max(0, model.get("options").length - 1);
    const slider = make("input", "tfnb-choice-slider", labelled(box, model), { type: "range", min: 0, max: last });
    const shown = make("span", "tfnb-choice-shown", box, { "aria-hidden": true }); // the slider itself says it
    const say = () => {
      const text = model.get("options")[slider.value] ?? "";
      shown.textContent = text;
      slider.setAttribute("aria-valuetext", text);
    };
    slider.addEventListener("input", () => {
      say();
      choose(Number(slider.value));
    });
    return () => {
      slider.value = model.get("index");
      say();
    };
  },
  buttons(box, model, choose) {
    const name = `tfnb-choice-${Math.random()}`; // every widget has a copy of this module, so a count is not unique
    const group = make("div", "tfnb-choice-buttons", box, { role: "radiogroup", "aria-label": model.get("label") });
    const inputs = model.get("options").map((text, place) => {
      const label = make("label", "tfnb-choice-button", group);
      const input = make("input", "", label, { type: "radio", name, value: place });
      make("span", "", label).textContent = text;
      input.addEventListener("change", () => choose(place));
      return input;
    });
    return () => inputs.forEach((input, place) => (input.checked = place === model.get("index")));
  },
};

function render({ model, el }) {
  const box = make("div", "tfnb-choice", el);
  let show = () => {};
  const choose = (place) => {
    model.set("index", place);
    model.save_changes();
  };
  const able = () => {
    for (const input of box.querySelectorAll("input, select")) input.disabled = model.get("disabled");
  };
  function layOut() {
    const focused = box.contains(document.activeElement);
    box.replaceChildren();
    box.title = model.get("help");
    show = KINDS[model.get("kind")](box, model, choose);
    show();
    able();
    if (focused) box.querySelector("select, input:checked, input[type=range]")?.focus();
  }
  const listeners = { "change:index": () => show(), "change:disabled": able };
  for (const name of ["label", "options", "groups", "kind", "help"]) listeners[`change:${name}`] = layOut;
  for (const [event, listener] of Object.entries(listeners)) model.on(event, listener);
  box.addEventListener("keydown", (event) => event.stopPropagation()); // the notebook has its own shortcuts
  layOut();
  return () => {
    for (const [event, listener] of Object.entries(listeners)) model.off(event, listener);
  };
}

export default { render };
