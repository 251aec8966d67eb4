const sections = [...document.querySelectorAll("section[data-frames]")], bar = document.querySelector(".controls");
if (sections.length && bar) {
  const [button, slider, output] = bar.children, longest = Math.max(...sections.map((each) => +each.dataset.frames));
  const rate = +sections[0].dataset.fps || 8;
  let at = 0, timer = null;
  const show = (frame) => {
    at = frame % longest;
    slider.value = at;
    output.value = `frame ${at + 1}`;
    for (const each of sections) each.style.setProperty("--at", at % +each.dataset.frames);
  };
  const play = (on) => {
    clearInterval(timer);
    timer = on ? setInterval(() => show(at + 1), 1000 / rate) : null;
    button.textContent = on ? "Pause" : "Play";
  };
  slider.max = longest - 1;
  slider.oninput = () => { play(false); show(+slider.value); };
  button.onclick = () => play(!timer);
  bar.style.display = "flex";
  show(0);
  play(longest > 1 && !matchMedia("(prefers-reduced-motion: reduce)").matches);
}
