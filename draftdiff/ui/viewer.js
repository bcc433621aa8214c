// <dense-sparse>: clips that play in step, under a slider, side by side or as their difference.
customElements.define("dense-sparse", class extends HTMLElement {
  connectedCallback() {
    const find = name => this.querySelector(name), all = [...this.querySelectorAll("video")];
    const frames = +this.dataset.frames, fps = +this.dataset.fps, [first] = all;
    const play = find(".play"), moment = find(".moment"), told = find("output");
    find(".wipe").oninput = event => find(".stage").style.setProperty("--at", event.target.value + "%");
    for (const link of this.querySelectorAll("a[download]"))
      link.href = find("." + link.dataset.of).src;
    for (const button of this.querySelectorAll("[data-mode]")) button.onclick = () => {
      this.dataset.mode = button.dataset.mode;
      for (const other of this.querySelectorAll("[data-mode]"))
        other.setAttribute("aria-pressed", other === button);
    };
    if (!first) return;
    const tell = () => {
      const at = Math.min(frames - 1, Math.floor(first.currentTime * fps + 0.01));
      moment.value = at;
      told.textContent = `frame ${at + 1} of ${frames}`;
    };
    const run = on => {
      play.setAttribute("aria-label", on ? "pause" : "play");
      for (const clip of all) on ? clip.play().catch(() => {}) : clip.pause();
    };
    play.onclick = () => run(first.paused);
    moment.oninput = () => {
      run(false);
      for (const clip of all) clip.currentTime = (+moment.value + 0.5) / fps;
    };
    first.onseeked = tell;
    const follow = () => {
      if (!this.isConnected) return;
      if (!first.paused) {
        for (const clip of all.slice(1))
          if (Math.abs(clip.currentTime - first.currentTime) > 0.5 / fps) clip.currentTime = first.currentTime;
        tell();
      }
      requestAnimationFrame(follow);
    };
    tell();
    run(true);
    follow();
  }
});
