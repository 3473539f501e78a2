"""Open a page in a real browser, without a window, and read back what plotly has drawn there."""

import json
import re
import shutil
import subprocess
import tempfile
from html import unescape
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FOUND = next((path for path in map(shutil.which, NAMES) if path), None)
MISSING = f"no browser: none of {', '.join(NAMES)} is on the PATH (Debian: apt-get install chromium)"

CATCH = "<script>var failures = []; addEventListener('error', event => failures.push(event.message));</script>"
PROBE = """<script>
addEventListener('load', () => setTimeout(() => {
  const charts = [...document.querySelectorAll('.js-plotly-plot')].map(chart => ({
    title: chart.closest('.card').querySelector('h3').textContent,
    height: chart.querySelector('.main-svg').getBoundingClientRect().height,
    marks: chart.querySelectorAll('.trace path, .points path, .fills path').length,
    axes: [...chart.querySelectorAll('.xtitle, .ytitle')].map(title => title.textContent),
    legend: [...chart.querySelectorAll('.legendtext')].map(text => text.textContent),
    lines: chart.calcdata.map(points => ({
      name: points[0].trace.name, x: points.map(point => point.x), y: points.map(point => point.y),
      colour: (points[0].trace.marker || points[0].trace.line || {}).color,
      categories: chart._fullLayout.yaxis._categories,
    })),
  }));
  const loaded = performance.getEntriesByType('resource').map(entry => entry.name).filter(name => !name.startsWith('data:'));
  const found = document.createElement('pre');
  found.id = 'probe';
  found.textContent = JSON.stringify({charts, failures, loaded});
  document.body.append(found);
}, 300));
</script>"""


def opened(page):
    """What the browser shows of the page: charts by title, errors of its scripts, and what it loaded from elsewhere."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(page).read_text().replace("<head>", "<head>" + CATCH, 1).replace("</body>", PROBE + "</body>")
        probed = Path(folder, "page.html")
        probed.write_text(text)
        options = [
            "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,2000", "--virtual-time-budget=10000",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder}/profile", "--dump-dom", probed.as_uri(),
        ]  # fmt: skip
        shown = subprocess.run([FOUND, *options], capture_output=True, text=True, timeout=120)
    match = re.search(r'<pre id="probe">(.*?)</pre>', shown.stdout, re.DOTALL)
    assert match, f"the page's scripts did not run to their end: {shown.stderr[-2000:]}"
    found = json.loads(unescape(match[1]))
    return {**found, "charts": {chart["title"]: chart for chart in found["charts"]}, "text": unescape(shown.stdout)}
