// The page of datalth-verdict: points say what they are, and a line that is pointed at is brought out in all panels.

const tip = document.getElementById("tip");

function bringOut(plot, number) {
  plot.classList.toggle("picked", number !== null);
  for (const line of plot.querySelectorAll(".line"))
    line.classList.toggle("on", line.closest("[data-line]").dataset.line === number);
}

/** The words of a point, over it, and within the window. */
function tell(point) {
  tip.textContent = point.getAttribute("aria-label");
  tip.hidden = false;
  const spot = point.getBoundingClientRect(), box = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, spot.left + spot.width / 2 - box.width / 2), innerWidth - box.width - 8);
  const top = spot.top - box.height - 8;
  tip.style.left = `${scrollX + left}px`;
  tip.style.top = `${scrollY + (top > 8 ? top : spot.bottom + 8)}px`;
}

for (const plot of document.querySelectorAll(".plot")) {
  for (const element of plot.querySelectorAll(".point, .legend li")) {
    const number = element.closest("[data-line]").dataset.line;
    const start = () => {
      bringOut(plot, number);
      if (element.matches(".point")) tell(element);
    };
    const end = () => {
      bringOut(plot, null);
      tip.hidden = true;
    };
    element.addEventListener("pointerenter", start);
    element.addEventListener("focus", start);
    element.addEventListener("pointerleave", end);
    element.addEventListener("blur", end);
  }
}
