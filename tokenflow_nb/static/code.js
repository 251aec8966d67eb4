// Code, folded, with a button that copies it.
function render({ model, el }) {
  const box = document.createElement("details");
  box.className = "tfnb-code";
  const summary = document.createElement("summary");
  summary.className = "tfnb-summary";
  const code = document.createElement("pre");
  code.tabIndex = 0;
  code.setAttribute("aria-label", "Code");
  const button = document.createElement("button");
  button.type = "button";
  button.className = "tfnb-button";
  button.setAttribute("aria-live", "polite");
  box.append(summary, code, button);
  el.append(box);

  function show() {
    summary.textContent = model.get("title");
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
  box.addEventListener("keydown", (event) => event.stopPropagation()); // the notebook has its own shortcuts
  for (const name of ["text", "title"]) model.on(`change:${name}`, show);
  show();
  return () => {
    for (const name of ["text", "title"]) model.off(`change:${name}`, show);
  };
}

export default { render };
