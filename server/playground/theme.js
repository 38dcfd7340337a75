// Runs before the page is drawn, so that a chosen theme never flashes in the other one.
"use strict";

(() => {
  const THEMES = ["auto", "light", "dark"];
  const KEPT = "prime-theme";

  const kept = () => {
    try {
      const name = localStorage.getItem(KEPT);
      return THEMES.includes(name) ? name : "auto";
    } catch {
      return "auto"; // storage may be forbidden; the theme then lasts as long as the page
    }
  };

  let theme = kept();

  const show = () => {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    const button = document.getElementById("theme");
    if (button) button.textContent = `Theme: ${theme}`;
  };

  show();
  document.addEventListener("DOMContentLoaded", () => {
    show();
    document.getElementById("theme").addEventListener("click", () => {
      theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
      try {
        localStorage.setItem(KEPT, theme);
      } catch {
        // not kept
      }
      show();
    });
  });
})();
