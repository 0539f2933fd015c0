// A browser starts no worker for a page that was opened from the file system, so the search of the site could not run
// there. For such pages Worker becomes a script in a frame of its own, which sends and gets the same messages.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.onmessage = null;
      this.addEventListener("message", (event) => this.onmessage?.(event));
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.documentElement.append(frame);
      this.frame = frame;
      const inside = frame.contentWindow;
      inside.document.open(); // a browser may replace the empty document of a new frame later, but not a written one
      inside.document.write("<!doctype html><title>Search</title>");
      inside.document.close();
      // What a worker has and a window has not, or has otherwise.
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      inside.importScripts = (...scripts) =>
        scripts.reduce((before, script) => before.then(() => load(inside, new URL(script, url).href)), Promise.resolve());
      this.loaded = load(inside, new URL(url, location.href).href);
    }

    postMessage(data) {
      const inside = this.frame.contentWindow;
      this.loaded.then(() => inside.dispatchEvent(new inside.MessageEvent("message", { data })));
    }

    terminate() {
      this.frame.remove();
    }
  };

  const load = (inside, href) =>
    new Promise((resolve, reject) => {
      const script = inside.document.createElement("script");
      script.src = href;
      script.onload = resolve;
      script.onerror = reject;
      inside.document.head.append(script);
    });
}
