// Every visible text with its contrast to what lies behind it; disabled controls are exempt.
(() => {
  const rgba = (text) => {
    const [r, g, b, a = 1] = text.match(/[\d.]+/g).map(Number);
    return [r, g, b, a];
  };
  const over = ([r, g, b, a], below) => [r, g, b].map((c, i) => c * a + below[i] * (1 - a));
  const light = (color) => {
    const [r, g, b] = color.map((c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const colors = [];
    for (let e = element; e; e = e.parentElement) colors.push(rgba(getComputedStyle(e).backgroundColor));
    return colors.reverse().reduce((below, color) => over(color, below), [255, 255, 255]);
  };
  document.querySelectorAll("details").forEach((details) => { details.open = true; });
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
    if (!text || element.closest("script, style, noscript, option, :disabled, .hoverlayer")) continue;
    if (!element.checkVisibility()) continue;
    const style = getComputedStyle(element), below = behind(element);
    const color = over(rgba(element.closest("svg") ? style.fill : style.color), below);
    const [high, low] = [light(color), light(below)].sort((a, b) => b - a);
    found.push([(high + 0.05) / (low + 0.05), text.slice(0, 40)]);
  }
  return found;
})()
