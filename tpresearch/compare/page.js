// Draws each figure's specification. `ast` has Vega interpret expressions, so that the page needs no eval.
document.querySelectorAll("figure").forEach(async (figure) => {
  const target = figure.querySelector(".chart");
  try {
    await vegaEmbed(target, JSON.parse(figure.querySelector("script").textContent), {
      ast: true,
      renderer: "svg",
      downloadFileName: figure.id,
      actions: { export: true, source: false, compiled: false, editor: false },
    });
    figure.dataset.drawn = "true";
  } catch (error) {
    target.textContent = `This chart could not be drawn: ${error}`;
    throw error;
  }
});
