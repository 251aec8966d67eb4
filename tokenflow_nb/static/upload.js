// A file from the browser to the kernel, in parts that are acknowledged one by one.
import { clamp, make } from "./film.js";

const PART = 1 << 20; // bytes
const WINDOW = 4; // parts under way: the line is busy, and memory is not
const QUIET = 3000; // milliseconds without an answer until it is said that the kernel is busy

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;

function render({ model, el }) {
  const box = make("div", "tfnb-upload", el, { "data-lm-suppress-shortcuts": "true" });
  const zone = make("div", "tfnb-upload-zone", box);
  const input = make("input", "tfnb-upload-file", zone, { type: "file", tabindex: -1, "aria-hidden": "true" });
  const choose = make("button", "tfnb-button tfnb-upload-choose", zone, { type: "button" });
  const work = make("div", "tfnb-upload-work", box);
  const bar = make("div", "tfnb-upload-bar", work, { role: "progressbar", "aria-valuemin": 0, "aria-valuemax": 100, "aria-label": "Upload" });
  const done = make("div", "tfnb-upload-done", bar);
  const cancel = make("button", "tfnb-button tfnb-upload-cancel", work, { type: "button" });
  cancel.textContent = "Cancel";
  const words = make("div", "tfnb-upload-words", box, { role: "status" });
  const fault = make("div", "tfnb-error", box, { role: "alert" });

  let job = null; // the file that is sent now
  let quiet = 0;

  const say = (text) => (words.textContent = text);
  function show() {
    choose.textContent = model.get("text");
    input.accept = model.get("accept");
    work.hidden = !job;
    choose.disabled = Boolean(job);
    const percent = job ? Math.floor((100 * job.kept) / Math.max(1, job.file.size)) : 0;
    done.style.width = `${percent}%`;
    bar.setAttribute("aria-valuenow", percent);
    bar.setAttribute("aria-valuetext", `${percent} %`);
    fault.textContent = model.get("error");
    fault.hidden = !fault.textContent;
  }

  function begin(file) {
    if (job) return say(`${job.file.name} is being uploaded: cancel it first, or wait`);
    job = { id: crypto.getRandomValues(new Uint32Array(4)).join("-"), file, sent: 0, kept: 0, reading: false };
    model.send({ upload: "begin", id: job.id, name: file.name, size: file.size, type: file.type });
    say(`${file.name}, ${megabytes(file.size)}: asking the kernel`);
    listen();
    show();
  }

  function listen() {
    clearTimeout(quiet);
    quiet = setTimeout(() => job && say(`${job.file.name}: the kernel is busy; the upload goes on when it is free`), QUIET);
  }

  // Sends parts while fewer than WINDOW are under way. They are read one after the other, so that they keep their order.
  async function send(mine) {
    if (mine.reading) return;
    mine.reading = true;
    try {
      while (mine === job && mine.sent < mine.file.size && mine.sent - mine.kept < WINDOW * PART) {
        const part = await mine.file.slice(mine.sent, mine.sent + PART).arrayBuffer();
        if (mine !== job) return;
        model.send({ upload: "part", id: mine.id, at: mine.sent }, undefined, [part]);
        mine.sent += part.byteLength;
      }
    } catch (error) {
      stop(`${mine.file.name} cannot be read any more (${error.message ?? error}): choose it again`);
    } finally {
      mine.reading = false;
    }
  }

  function heard(content) {
    if (!job || content.id !== job.id) return;
    if (content.upload === "refused") return end("");
    if (content.upload === "done") return end(`${job.file.name}, ${megabytes(job.file.size)}: uploaded`);
    job.kept = content.kept;
    listen();
    say(`${job.file.name}: ${megabytes(job.kept)} of ${megabytes(job.file.size)}`);
    send(job);
    show();
  }

  function end(text) {
    clearTimeout(quiet);
    job = null;
    input.value = ""; // the same file can be chosen again
    say(text);
    show();
  }

  function stop(text) {
    if (!job) return;
    model.send({ upload: "cancel", id: job.id });
    end(text);
    choose.focus();
  }

  choose.addEventListener("click", () => input.click());
  input.addEventListener("change", () => input.files[0] && begin(input.files[0]));
  cancel.addEventListener("click", () => stop(`${job.file.name}: cancelled`));
  box.addEventListener("keydown", (event) => {
    if (!event.ctrlKey && !event.metaKey && event.key !== "Tab") event.stopPropagation(); // the notebook has its own shortcuts
  });

  let inside = 0; // a drag enters a child before it leaves its parent
  const over = (change) => {
    inside = clamp(inside + change, 0, 99);
    zone.classList.toggle("tfnb-upload-over", inside > 0);
  };
  const holdsFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  zone.addEventListener("dragenter", (event) => holdsFiles(event) && (event.preventDefault(), over(1)));
  zone.addEventListener("dragleave", () => over(-1));
  zone.addEventListener("dragover", (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    event.stopPropagation(); // else the notebook takes the file
    event.dataTransfer.dropEffect = "copy";
  });
  zone.addEventListener("drop", (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    event.stopPropagation();
    over(-99);
    if (event.dataTransfer.files.length > 1) return say("one film at a time: drop a single file");
    begin(event.dataTransfer.files[0]);
  });

  const listeners = { "msg:custom": heard };
  for (const name of ["text", "accept", "error"]) listeners[`change:${name}`] = show;
  for (const [event, listener] of Object.entries(listeners)) model.on(event, listener);
  show();

  return () => {
    clearTimeout(quiet);
    if (job) model.send({ upload: "cancel", id: job.id });
    job = null;
    for (const [event, listener] of Object.entries(listeners)) model.off(event, listener);
  };
}

export default { render };
