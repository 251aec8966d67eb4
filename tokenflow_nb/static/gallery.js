// Rendered films as cards: a click shows one again, two chosen can be compared.
import { make } from "./film.js";

function render({ model, el }) {
  const box = make("section", "tfnb-gallery", el, { "aria-label": "Rendered films" });
  const head = make("div", "tfnb-gallery-head", box);
  make("h4", "tfnb-title", head).textContent = "Rendered films";
  const compare = make("button", "tfnb-button", head, { type: "button" });
  const list = make("ul", "tfnb-cards", box);
  let addresses = [];
  let chosen = new Set();

  function layOut() {
    addresses.forEach((address) => URL.revokeObjectURL(address));
    addresses = model.get("posters").map((bytes) => URL.createObjectURL(new Blob([bytes], { type: "image/png" })));
    const items = model.get("items");
    chosen = new Set([...chosen].filter((id) => items.some((item) => item.id === id)));
    list.replaceChildren();
    items.forEach((item, index) => card(item, addresses[index]));
    box.hidden = !items.length;
    show();
  }

  function card(item, address) {
    const entry = make("li", "tfnb-card", list);
    entry.dataset.id = item.id;
    const button = make("button", "tfnb-card-show", entry, { type: "button", title: item.title });
    if (address) make("img", "", button, { src: address, alt: "" });
    make("span", "tfnb-card-title", button).textContent = item.title;
    make("span", "tfnb-card-line", button).textContent = item.line;
    button.addEventListener("click", () => model.send({ show: item.id }));
    const foot = make("div", "tfnb-card-foot", entry);
    const label = make("label", "", foot);
    const check = make("input", "", label, { type: "checkbox", "aria-label": `Compare ${item.title}` });
    check.checked = chosen.has(item.id);
    make("span", "", label).textContent = "compare";
    check.addEventListener("change", () => {
      check.checked ? chosen.add(item.id) : chosen.delete(item.id);
      show();
    });
    const drop = make("button", "tfnb-link", foot, { type: "button", "aria-label": `Remove ${item.title}` });
    drop.textContent = "remove";
    drop.addEventListener("click", () => {
      if (drop.dataset.sure) return model.send({ remove: item.id });
      drop.dataset.sure = "yes"; // a film took minutes: ask once
      drop.textContent = "really?";
      setTimeout(() => {
        delete drop.dataset.sure;
        drop.textContent = "remove";
      }, 4000);
    });
  }

  function show() {
    const current = model.get("current");
    for (const entry of list.children) {
      const here = entry.dataset.id === current;
      entry.classList.toggle("tfnb-card-current", here);
      entry.firstChild.setAttribute("aria-current", here);
    }
    compare.disabled = chosen.size < 2;
    compare.textContent = chosen.size < 2 ? "Compare: choose two" : `Compare these ${chosen.size}`;
  }
  compare.addEventListener("click", () => model.send({ compare: [...chosen] }));
  box.addEventListener("keydown", (event) => event.stopPropagation()); // the notebook has its own shortcuts

  const listeners = { "change:items": layOut, "change:posters": layOut, "change:current": show };
  for (const [event, listener] of Object.entries(listeners)) model.on(event, listener);
  layOut();
  return () => {
    for (const [event, listener] of Object.entries(listeners)) model.off(event, listener);
    addresses.forEach((address) => URL.revokeObjectURL(address));
  };
}

export default { render };
