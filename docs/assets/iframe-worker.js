// Search runs in a worker. Browsers refuse workers to pages that are opened as files, so there
// a hidden frame takes the worker's place. The theme knows it by the name IFrameWorker.
(() => {
  if (location.protocol !== "file:") return;

  const load = (page, url) =>
    new Promise((resolve, reject) => {
      const script = page.createElement("script");
      script.src = url;
      script.onload = resolve;
      script.onerror = reject;
      page.body.append(script);
    });

  class IFrameWorker extends EventTarget {
    constructor(url) {
      super();
      const address = new URL(url, document.baseURI).href;
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.frame.title = "search";
      this.frame.srcdoc = "<!doctype html><body></body>";
      // Messages wait until the frame and its script are there.
      this.ready = new Promise((resolve) => {
        this.frame.onload = () => resolve(this.start(address));
      });
      document.body.append(this.frame);
    }

    async start(address) {
      const inner = this.frame.contentWindow;
      inner.postMessage = (data) =>
        this.dispatchEvent(new MessageEvent("message", { data }));
      inner.importScripts = (...urls) =>
        urls.reduce(
          (before, url) => before.then(() => load(inner.document, url)),
          Promise.resolve(),
        );
      await load(inner.document, address);
      return inner;
    }

    async postMessage(data) {
      const inner = await this.ready;
      inner.dispatchEvent(new inner.MessageEvent("message", { data }));
    }

    terminate() {
      this.frame.remove();
    }
  }

  window.IFrameWorker = IFrameWorker;
  window.Worker = IFrameWorker;
})();
