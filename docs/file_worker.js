// The search of the site runs in a worker, and browsers start none for pages that are opened from a disk (file://).
// There, this stands in for it: a hidden frame that runs the script of the worker.
if (location.protocol === "file:") {
  class FrameWorker extends EventTarget {
    constructor(address) {
      super();
      const frame = document.body.appendChild(document.createElement("iframe"));
      frame.hidden = true;
      this.inside = frame.contentWindow;
      this.waiting = [];
      const page = this.inside.document;
      this.inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }));
      const load = source => new Promise((resolve, reject) => {
        const script = page.createElement("script");
        Object.assign(script, { src: source, onload: resolve, onerror: reject });
        page.head.append(script);
      });
      this.inside.importScripts = (...sources) =>
        sources.reduce((before, source) => before.then(() => load(source)), Promise.resolve());
      load(address).then(() => {
        this.waiting.forEach(data => this.send(data));
        this.waiting = null;
      });
    }
    postMessage(data) {
      if (this.waiting) this.waiting.push(data);
      else this.send(data);
    }
    send(data) {
      this.inside.dispatchEvent(new MessageEvent("message", { data }));
    }
  }
  window.IFrameWorker = window.Worker = FrameWorker;
}
