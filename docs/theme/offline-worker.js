// A page that is opened as a file may not start a worker, which the search needs. There a hidden frame does its work.
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(address) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const inside = frame.contentWindow;
      const load = (script) =>
        new Promise((resolve, reject) => {
          const element = inside.document.createElement("script");
          Object.assign(element, { src: script, onload: resolve, onerror: reject });
          inside.document.body.append(element);
        });
      inside.importScripts = (...scripts) => scripts.reduce((before, script) => before.then(() => load(script)), Promise.resolve());
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.ready = load(new URL(address, location.href).href);
      this.post = (data) => inside.dispatchEvent(new inside.MessageEvent("message", { data }));
    }
    postMessage(data) {
      this.ready.then(() => this.post(data));
    }
    terminate() {}
  };
}
