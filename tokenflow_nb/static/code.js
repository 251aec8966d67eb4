// Code with a button that copies it.
function render({ model, el }) {
  const box = document.createElement("div");
  box.className = "tfnb-code";
  const code = document.createElement("pre");
  code.tabIndex = 0;
  code.setAttribute("aria-label", "Code");
  const button = document.createElement("button");
  button.type = "button";
  button.setAttribute("aria-live", "polite");
  box.append(code, button);
  el.append(box);

  function show() {
    code.textContent = model.get("text");
    button.textContent = "Copy";
    box.hidden = !code.textContent;
  }
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code); // a frame that may not write to the clipboard, as in Colab
      button.textContent = "Selected: press Ctrl+C or ⌘C";
    }
  });
  model.on("change:text", show);
  show();
  return () => model.off("change:text", show);
}

export default { render };
