// Buttons that fetch a file from the kernel, piece by piece, and hand it to the browser.
import { make } from "./film.js";

const TYPES = { mp4: "video/mp4", json: "application/json", png: "image/png" };

function render({ model, el }) {
  const box = make("div", "tfnb-download", el, { role: "group", "aria-label": "Download" });
  const said = make("span", "tfnb-spoken", box, { role: "status" });
  let asked = null; // the file under way, with its pieces

  function layOut() {
    [...box.querySelectorAll("button")].forEach((button) => button.remove());
    for (const { name, label } of model.get("files")) {
      const button = make("button", "tfnb-button", box, { type: "button" });
      button.textContent = label;
      button.addEventListener("click", () => {
        asked = { name, button, label, pieces: [] };
        button.textContent = "…";
        model.send({ want: name });
      });
    }
  }

  function take(content, buffers) {
    if (!asked || content.name !== asked.name) return;
    const { name, button, label, pieces } = asked;
    if (content.error) {
      button.textContent = label;
      said.textContent = content.error;
      asked = null;
      return;
    }
    pieces.push(...buffers);
    if (!content.last) return void (button.textContent = `${Math.round(100 * content.share)} %`);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(pieces, { type: TYPES[name.split(".").pop()] ?? "" }));
    link.download = content.as ?? name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    button.textContent = label;
    said.textContent = `${label} is downloaded`;
    asked = null;
  }

  model.on("msg:custom", take);
  model.on("change:files", layOut);
  layOut();
  return () => {
    model.off("msg:custom", take);
    model.off("change:files", layOut);
  };
}

export default { render };
