// The scripts are modules without a build step; node takes them from their text, with what they import in front.
import { readFileSync } from "node:fs";

const text = (name) => readFileSync(new URL(`../../tokenflow_nb/static/${name}`, import.meta.url), "utf8");
export const load = (name) => import(`data:text/javascript,${encodeURIComponent(text(name))}`);

globalThis.createImageBitmap = async (blob) => ({ width: 4, height: 2, text: await blob.text(), closed: false, close() { this.closed = true; } });

// A widget's model as the notebook gives it, which keeps what is sent.
export class Model {
  constructor(values = {}) {
    Object.assign(this, { values, sent: [], listeners: new Map() });
  }
  get = (name) => this.values[name];
  set = (name, value) => (this.values[name] = value);
  save_changes() {}
  send = (content, _, buffers) => this.sent.push({ ...content, buffers });
  on = (event, listener) => this.listeners.set(listener, event);
  off = (event, listener) => this.listeners.delete(listener);
  fire = (event, ...values) => {
    for (const [listener, name] of [...this.listeners]) if (name === event) listener(...values);
  };
}

export const settled = () => new Promise((resolve) => setTimeout(resolve, 5));
