// A formula in a line that is longer than the line gets a line of its own, in which it scrolls.
const setLongFormulas = () => {
  for (const box of document.querySelectorAll('.bd-article mjx-container:not([display="true"])')) {
    box.classList.remove("irann-long");
    const line = box.closest("p, li, td, th, dd, summary, h1, h2, h3") ?? box.parentElement;
    const formula = box.querySelector("mjx-math").getBoundingClientRect();
    if (formula.right > line.getBoundingClientRect().right + 1) box.classList.add("irann-long");
  }
};

window.addEventListener("load", () => {
  window.MathJax?.startup?.promise?.then(() => {
    setLongFormulas();
    window.addEventListener("resize", setLongFormulas);
    for (const fold of document.querySelectorAll("details")) fold.addEventListener("toggle", setLongFormulas);
  });
});
