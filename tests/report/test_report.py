"""The HTML report: what is in it, and, in a real browser, that it works offline and runs nobody's text."""

import json
import os
import re
import shutil
import time

import pytest
from synthetic import trajectory, turn, write_run, write_step

from rema_verl.dialogue import META_THINKING, REASONING
from rema_verl.report.charts import charts
from rema_verl.report.html import write_report
from rema_verl.report.run import config_diff, read_run

ATTACK = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'><b>bold</b> &amp; \ud800\u2028"


def titles(runs) -> list[str]:
    return [chart.title for chart in charts(runs)]


def data(page: str, id: str):
    """The JSON in a script element, as a browser would read it."""
    return json.loads(re.search(rf'id="{id}">(.*?)</script>', page, re.S)[1])


# ------------------------------------------------------------------------------------------------ without a browser


def test_later_launches_win_and_cut_lines_are_counted(tmp_path):
    run = write_run(tmp_path / "run", steps=3)
    line = json.dumps({"step": 2, "data": {"reward/acc/mean": 0.125, "text": "x", "nan": None}})
    (run / "metrics" / "20260102-000000.jsonl").write_text(line + '\n{"step": 3, "da')
    found = read_run(run)
    assert found.metrics[2]["reward/acc/mean"] == 0.125 and found.unreadable == 1
    assert "text" not in found.metrics[2] and "dialogue/turns/mean" in found.metrics[2]


def test_every_metric_of_a_run_has_its_chart(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    found = titles([run])
    for title in (
        "Accuracy", "Reward", "Turns per role", "Tokens per role", "Finish rate", "Stop reasons", "Turn ratios",
        "Clip fraction per role", "Entropy per role", "Actions in round 1", "Actions in round 2", "Where the time goes",
        "Prefill efficiency", "Prefill against the least", "lazy_share", "echo/within", "leak_share",
        "zero_advantage_groups", "entropy_vs_start/reasoning", "log_ratio/rollout_max", "grading_timeout_share",
    ):  # fmt: skip
        assert title in found, title


def test_validation_points_stand_at_their_steps(tmp_path):
    run = read_run(write_run(tmp_path / "run", steps=12))
    accuracy = next(c for c in charts([run]) if c.title == "Accuracy")
    training, validation = accuracy.figure.data
    assert list(training.x) == list(range(1, 13))
    assert list(validation.x) == [0, 2, 4, 6, 8, 10, 12] and "markers" in validation.mode


def test_what_a_run_does_not_have_has_no_chart(tmp_path):
    (tmp_path / "run" / "metrics").mkdir(parents=True)
    row = {"step": 1, "data": {"reward/acc/mean": 0.5}}
    (tmp_path / "run" / "metrics" / "a.jsonl").write_text(json.dumps(row) + "\n")
    run = read_run(tmp_path / "run")
    assert titles([run]) == ["Accuracy"]
    write_report([run], tmp_path / "r.html")
    assert "rema.trajectories.folder" in (tmp_path / "r.html").read_text()


def test_one_model_per_role_has_its_ratios(tmp_path):
    (tmp_path / "m.jsonl").write_text(json.dumps({"step": 1, "data": {"reasoning/actor/turn_ratio_max": 2.0}}) + "\n")
    assert titles([read_run(tmp_path / "m.jsonl")]) == ["Turn ratios"]


def test_the_difference_of_configurations(tmp_path):
    runs = [
        read_run(write_run(tmp_path / name, steps=1, config={"rema": {"max_turns": turns}, "trainer": {"only": name}}))
        for name, turns in (("a", 4), ("b", 8))
    ]
    assert config_diff(runs) == [("rema.max_turns", ["4", "8"]), ("trainer.only", ['"a"', '"b"'])]
    assert config_diff(runs[:1]) == []


def test_the_page_asks_for_nothing_from_outside(tmp_path):
    write_report([read_run(write_run(tmp_path / "run", steps=3))], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    head = page[: page.index('id="figures"')]
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", head)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy
    assert "unsafe-inline" not in policy.split("script-src")[1]


def test_a_report_is_whole_or_not_there(tmp_path):
    run = write_run(tmp_path / "run", steps=2)
    (run / "trajectories" / "step_000002.jsonl").write_text("{")
    with pytest.raises(ValueError, match="step_000002"):
        write_report([read_run(run)], tmp_path / "r.html")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


# ----------------------------------------------------------------------------------------------------- in a browser


class Page:
    """A report, opened."""

    def __init__(self, driver, path, width: int, height: int = 900):
        self.driver = driver
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        driver.get_log("browser"), driver.get_log("performance")
        start = time.monotonic()
        driver.get(path.as_uri())
        self.wait("document.documentElement.dataset.ready === 'true'")
        self.seconds = time.monotonic() - start

    def js(self, code: str):
        return self.driver.execute_script(code)

    def get(self, expression: str):
        return self.js(f"return {expression}")

    def wait(self, condition: str, timeout: float = 120) -> None:
        end = time.monotonic() + timeout
        while not self.get(condition):
            assert time.monotonic() < end, f"never came true: {condition}"
            time.sleep(0.05)

    def enter(self, field: str, value: str) -> None:
        """Fill in a field, as if it were then left."""
        self.js(
            f"const e = document.getElementById('{field}'); e.value = '{value}'; e.dispatchEvent(new Event('change'))"
        )

    def count(self) -> str:
        return self.get("document.getElementById('count').textContent")

    def detail(self) -> str:
        return self.get("document.getElementById('detail').textContent.toWellFormed()")

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses of everything the page asked for."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """Chromium without a screen. CI must have it; elsewhere its absence skips."""
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        reason = "no chromium and chromedriver (Debian: apt-get install chromium chromium-driver)"
        wanted = os.environ.get("CI") and not os.environ.get("REMA_NO_BROWSER")
        pytest.fail(reason) if wanted else pytest.skip(reason)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for switch in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    driver.set_page_load_timeout(300)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        read_run(write_run(folder / name, steps=30, per_step=8, seed=i, config={"rema": {"max_turns": 4 + i}}))
        for i, name in enumerate(("base", "other"))
    ]
    write_report(runs, folder / "r.html")
    return folder / "r.html"


@pytest.mark.parametrize("width", [1280, 390])
def test_every_chart_is_drawn_and_nothing_is_wider_than_the_screen(driver, two_runs, width):
    page = Page(driver, two_runs, width)
    total = page.get("document.querySelectorAll('.plot').length")
    assert total > 25
    drawn = "document.querySelectorAll('.plot .main-svg').length"
    assert page.get("document.querySelectorAll('.plot:has(.main-svg)').length") < total  # only what is near the screen
    for i in range(total):
        page.js(f"document.querySelectorAll('.plot')[{i}].scrollIntoView({{behavior: 'instant'}})")
        page.wait(f"document.querySelectorAll('.plot')[{i}].querySelector('.main-svg') !== null")
    assert page.get(drawn) >= total
    assert (
        page.get("document.querySelectorAll('.plot .js-line, .plot .bars .point').length") > total
    )  # with something in them
    assert page.get("document.documentElement.scrollWidth") <= width
    edges = page.get("[...document.querySelectorAll('.plot .main-svg')].map(s => s.getBoundingClientRect().right)")
    assert max(edges) <= width
    assert page.errors() == []
    assert [u for u in page.requests() if not u.startswith(("file:", "data:", "blob:"))] == []


def test_the_browser_of_trajectories(driver, two_runs):
    page = Page(driver, two_runs, 1280)
    assert page.count() == "240 of 240 trajectories"
    assert page.get("document.querySelectorAll('.row').length") == 60
    page.js("document.getElementById('list').scrollTop = 1e6")
    page.wait("document.querySelectorAll('.row').length === 120")
    page.js("document.querySelector('[data-flag=wrong]').click()")
    page.js("document.querySelector('[data-flag=lazy]').click()")
    page.wait("document.getElementById('detail').textContent.includes('lazy')")
    assert 0 < int(page.count().split()[0]) < 60
    assert page.get(
        "[...document.querySelectorAll('.row')]"
        ".every(r => r.textContent.includes('lazy') && r.querySelector('.dot:not(.right)'))"
    )
    page.js("document.querySelectorAll('#flags button').forEach(b => b.ariaPressed === 'true' && b.click())")
    for field in ("from", "to"):
        page.enter(field, "7")
    assert page.count() == "8 of 240 trajectories"
    page.js("document.querySelectorAll('.row')[3].click()")
    page.wait("document.getElementById('detail').textContent.includes('trajectory 00070003')")
    page.enter("run", "1")
    page.wait("document.getElementById('count').textContent === '8 of 240 trajectories'")
    assert page.errors() == []


def test_search_finds_a_word_in_one_message_of_one_step(driver, tmp_path):
    run = write_run(tmp_path / "run", steps=9, per_step=5)
    hit = trajectory(4, "the one", [turn(META_THINKING, "plan"), turn(REASONING, "a Needle indeed")])
    write_step(run / "trajectories", 4, [trajectory(4, "other"), hit])
    write_report([read_run(run)], tmp_path / "r.html")
    page = Page(driver, tmp_path / "r.html", 1280)
    page.enter("search", "nEEdle")
    page.wait("document.getElementById('count').textContent === '1 of 42 trajectories'")
    page.wait("document.getElementById('detail').textContent.includes('the one')")


def test_a_row_shows_its_mask_and_each_turn_its_advantage(driver, tmp_path):
    run = tmp_path / "run"
    turns = [
        turn(META_THINKING, "m1", advantage=1.5), turn(REASONING, "r1", advantage=None, log_ratio=None),
        turn(META_THINKING, "m2", advantage=-0.25), turn(REASONING, "r2", advantage=None, clipped=True),
    ]  # fmt: skip
    write_step(run / "trajectories", 1, [trajectory(1, "t", turns)])
    write_report([read_run(run)], tmp_path / "r.html")
    page = Page(driver, tmp_path / "r.html", 1280)
    cards = "[...document.querySelectorAll('.turn')].map(t => t.className + ': ' + t.textContent)"
    dialogue = page.get(cards)
    assert [c.split(":")[0] for c in dialogue] == ["turn meta_thinking", "turn reasoning"] * 2
    assert "advantage +1.5" in dialogue[0] and "advantage –" in dialogue[1] and "advantage -0.25" in dialogue[2]
    assert "clipped" in dialogue[3] and "clipped" not in dialogue[0]
    colours = page.get("[...document.querySelectorAll('.turn .who')].map(w => getComputedStyle(w).color)")
    assert colours[0] == colours[2] != colours[1] == colours[3]
    page.js("document.querySelectorAll('.tabs button')[1].click()")
    meta = page.get(cards)
    assert ["masked" in c.split(":")[0] for c in meta] == [False, True, False, True]
    assert "trained: mask 1" in meta[0] and "masked: mask 0" in meta[1] and "not in this row" in meta[3]
    page.js("document.querySelectorAll('.tabs button')[2].click()")
    reasoning = page.get(cards)
    assert "masked: mask 0" in reasoning[0] and "own turn, not trained in this step" in reasoning[1]
    assert page.errors() == []


def test_nobody_s_text_is_run(driver, tmp_path):
    """Script elements and handlers in messages, questions, names, metrics and configuration are text on the screen."""
    run = tmp_path / "<img src=x onerror=window.hacked=1>"
    turns = [turn(META_THINKING, ATTACK), turn(REASONING, ATTACK)]
    bad = trajectory(1, ATTACK, turns, question=ATTACK, truth=ATTACK, uid=ATTACK, stop_reason=ATTACK, picked=[ATTACK])
    write_step(run / "trajectories", 1, [bad])
    (run / "metrics").mkdir()
    names = ("reward/acc/mean", f"val-core/{ATTACK}/acc/mean@1", f"timing_s/{ATTACK.replace('/', '|')}")
    lines = [json.dumps({"step": s, "data": dict.fromkeys(names, 0.5)}) + "\n" for s in (1, 2)]
    (run / "metrics" / "a.jsonl").write_text("".join(lines))
    (run / "hydra" / ".hydra").mkdir(parents=True)
    (run / "hydra" / ".hydra" / "config.yaml").write_text(json.dumps({"key": ATTACK}))
    (run / "hydra" / ".hydra" / "overrides.yaml").write_text(json.dumps([ATTACK]))
    write_report([read_run(run)], tmp_path / "r.html")
    page = Page(driver, tmp_path / "r.html", 1280)
    page.wait("document.querySelector('.plot .main-svg') !== null")
    page.wait("document.querySelectorAll('.turn').length === 2")
    page.js("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert "<script>window.hacked=1</script>" in page.detail()
    assert (
        page.get("document.querySelectorAll('#detail script, #detail img, #detail b, .row img, table img').length") == 0
    )
    assert page.get("typeof window.hacked") == "undefined"
    assert page.errors() == []


def test_the_content_security_policy_holds(driver, two_runs):
    """Even markup that did get into the page would not run: the second line of defence works by itself."""
    page = Page(driver, two_runs, 1280)
    page.js("document.body.insertAdjacentHTML('beforeend', '<img src=data:, onerror=\"window.hacked=1\">')")
    page.js("const s = document.createElement('script'); s.text = 'window.hacked = 2'; document.body.append(s)")
    time.sleep(0.5)
    assert page.get("typeof window.hacked") == "undefined"
    assert any("Content Security Policy" in message for message in page.errors())


@pytest.mark.slow
def test_500_steps_of_50_trajectories(driver, tmp_path, capsys):
    """25,000 trajectories: the page comes up, lists a few, filters and searches all; the times are printed."""
    start = time.monotonic()
    run = write_run(tmp_path / "run", steps=500, per_step=50, words=60)
    generated = time.monotonic() - start
    start = time.monotonic()
    write_report([read_run(run)], tmp_path / "r.html")
    written = time.monotonic() - start
    page = Page(driver, tmp_path / "r.html", 1280)
    assert page.count() == "25000 of 25000 trajectories"
    assert page.get("document.querySelectorAll('.row').length") == 60
    page.wait("document.querySelectorAll('.turn').length === 4")  # the first one is open: the page answers
    start = time.monotonic()
    page.js("document.querySelector('[data-flag=echo]').click()")
    filtered = time.monotonic() - start
    assert 0 < int(page.count().split()[0]) < 25000
    page.js("document.querySelector('[data-flag=echo]').click()")
    page.js(
        "window.longest = 0; let last = performance.now(); setInterval(() => { const now = performance.now();"
        "window.longest = Math.max(window.longest, now - last); last = now }, 0)"
    )
    start = time.monotonic()
    page.enter("search", "no such word")
    page.wait("document.getElementById('count').textContent === '0 of 25000 trajectories'")
    searched = time.monotonic() - start
    texts = sum(p.stat().st_size for p in (run / "trajectories").iterdir()) / 2**20
    with capsys.disabled():
        print(
            f"\n25,000 trajectories ({texts:.0f} MiB): made in {generated:.1f} s, page of "
            f"{(tmp_path / 'r.html').stat().st_size / 2**20:.0f} MiB written in {written:.1f} s, interactive after "
            f"{page.seconds:.1f} s, filter {filtered:.2f} s, search of all texts {searched:.1f} s, the page blocked "
            f"for {page.get('window.longest'):.0f} ms at most"
        )
    assert page.errors() == []
