"""What a run saves of a step's groups, and the page that shows it, in a real browser too."""

import json
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import read_rollouts, read_rows

import plot
from infra.step_page import quantise

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
               None)
HOSTILE = ("</script><script>document.title='live'</script><img src=x onerror=\"document.title="
           "'live'\"><!--<script>\x00\x1b[31m\u202e\u2028\ud800 &lt;b&gt; {{data}}")

BEYOND = "beyond train_batch_size"


def make_record(position: int = 0, response: str = "6", texts=("6", "<eos>"), **changes) -> dict:
    """A line of a rollout file; `texts` of None: without figures of its tokens."""
    record = {"step": 3, "position": position, "prompt": "1+5?", "answer": "6",
              "response": response, "tokens": 2, "finish_reason": "stop", "pred": "6", "acc": 1.0,
              "score": 1.0, "status": "ok", "reward": 0.75, "final_reward": 0.75, "advantage": 1.5}
    if texts:
        record["token_stats"] = {
            "update": 2, "texts": list(texts), "flags": {"clip_frac_high": [0]},
            "values": {"ratio": [1.3, *[1.0] * (len(texts) - 1)], "entropy": [0.5] * len(texts),
                       "token_prob": [0.25] * len(texts)}}
    return record | changes


@pytest.fixture
def make_page(tmp_path, monkeypatch):
    """`make_page(records, dropped, step=3)` writes a run's files and calls the script; returns the
    path of the page."""
    def make_page(records=(), dropped=(), step: int = 3, *options: str) -> Path:
        run_dir = tmp_path / "a&b"
        (run_dir / "rollouts").mkdir(parents=True, exist_ok=True)
        (run_dir / "metrics.jsonl").write_text('{"step": 3, "reward/mean": 0.5}\n')
        for name, of_file in (("step", records), ("dropped", dropped)):
            if of_file:
                lines = [record if isinstance(record, str) else json.dumps(record)
                         for record in of_file]
                (run_dir / f"rollouts/{name}_00003.jsonl").write_text("\n".join(lines) + "\n")
        monkeypatch.setattr(sys, "argv", ["plot.py", str(run_dir), "--step", str(step), *options])
        plot.main()
        return run_dir / f"step_{step:05d}.html"
    return make_page


def page_data(page: Path) -> list[dict]:
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def tags(page: Path) -> list:
    """All tags of the page, with their attributes, but the pictures' contents."""
    found = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.append((tag, [pair for pair in attributes if pair[0] != "src"]))
    Parser().feed(page.read_text(encoding="utf-8"))
    return found


# ---- what a run saves ----

@pytest.mark.dapo
def test_a_run_saves_the_figures_of_each_token_and_its_page_is_written(start, monkeypatch):
    """Those of the last epoch, in which the first updates have changed the policy."""
    run_dir = start("total_training_steps=1", "val.file=", "actor.ppo_epochs=2", "save_rollouts=4",
                    "actor.lr=0.003", "actor.lr_warmup_steps=0")
    records = read_rollouts(run_dir, 1)
    assert len(records) == 16
    ratios, clipped, entropies = [], 0, []
    for record in records:
        stats = record["token_stats"]
        values, flags = stats["values"], stats["flags"]
        assert stats["update"] in (3, 4)  # of 2 updates an epoch
        eos = "<eos>" if record["finish_reason"] == "stop" else ""
        assert "".join(stats["texts"]) == record["response"] + eos
        for of_tokens in (stats["texts"], values["ratio"], values["entropy"], values["token_prob"]):
            assert len(of_tokens) == record["tokens"]
        kind, limit = (("high", 1.28) if record["advantage"] > 0 else ("low", 0.8))
        outside = [i for i, ratio in enumerate(values["ratio"])
                   if (ratio > limit if kind == "high" else ratio < limit)]
        assert flags[f"clip_frac_{kind}"] == outside
        clipped += len(outside)
        ratios += values["ratio"]
        entropies += values["entropy"]
    assert clipped and len(set(ratios)) > len(ratios) / 4
    assert 0 < sum(entropies) / len(entropies) < 2
    monkeypatch.setattr(sys, "argv", ["plot.py", str(run_dir), "--step", "1"])
    plot.main()
    groups = page_data(run_dir / "step_00001.html")
    assert [group["outcome"] for group in groups][:4] == ["trained"] * 4
    assert [len(group["responses"]) for group in groups[:4]] == [4] * 4
    assert f"{len(groups)} groups saved" in (run_dir / "step_00001.html").read_text()
    assert groups[0]["responses"][0]["texts"] == records[0]["token_stats"]["texts"]


def test_the_first_mini_batch_is_saved_with_the_ratio_one(start):
    run_dir = start("total_training_steps=1", "val.file=", "save_rollouts=4")
    for record in read_rollouts(run_dir, 1):
        stats = record["token_stats"]
        assert (set(stats["values"]["ratio"]) == {1.0}) == (stats["update"] == 1)


@pytest.mark.parametrize("count, expected", [
    (1, [(1, "all wrong")]), (3, [(1, "all wrong"), (3, "all correct"), (8, BEYOND)]),
    (4, [(1, "all wrong"), (3, "all correct"), (8, BEYOND), (2, "all wrong")])])
def test_as_many_dropped_groups_are_saved_of_every_reason_in_turn(
        start, fake_rollouts, count, expected):
    accs = {1: [0.0] * 4, 2: [0.0] * 4, 3: [1.0] * 4, 5: [0.0] * 4}
    fake_rollouts(lambda position: accs.get(position, [0.0, 1.0, 0.0, 1.0]))
    run_dir = start("total_training_steps=1", "val.file=", "data.gen_batch_size=9",
                    f"save_rollouts={count}")
    saved = [record["position"] for record in read_rollouts(run_dir, 1)]
    assert saved[::4] == [0, 4, 6, 7][:count]
    lines = (run_dir / "rollouts/dropped_00001.jsonl").read_text().splitlines()
    dropped = [(record["position"], record["dropped"]) for record in map(json.loads, lines)]
    assert dropped[::4] == expected and len(dropped) == 4 * count
    assert {record["advantage"] for record in map(json.loads, lines)} == {None}


def test_groups_of_a_skipped_step_say_why_and_other_metrics_are_named(start, fake_rollouts):
    fake_rollouts(lambda position: [0.0, 1.0, 0.0, 1.0] if position == 2 else [0.5] * 4)
    run_dir = start("total_training_steps=1", "val.file=", "save_rollouts=3",
                    "filter_groups.max_num_gen_batches=1", "filter_groups.at_limit=skip")
    reasons = [record["dropped"] for record in read_rollouts(run_dir, 1)]
    same = "all of its responses have the same accuracy"
    assert reasons[::4] == [same, "step skipped", same]
    assert not (run_dir / "rollouts/dropped_00001.jsonl").exists()


def test_figures_of_tokens_can_be_left_out(start):
    run_dir = start("total_training_steps=1", "val.file=", "save_token_stats=false")
    records = read_rollouts(run_dir, 1)
    assert records and not any(record["token_stats"] for record in records)


def test_without_saved_rollouts_no_file_is_written(start):
    run_dir = start("total_training_steps=1", "val.file=", "save_rollouts=0")
    assert not list((run_dir / "rollouts").iterdir()) and len(read_rows(run_dir)) == 1


def test_a_resumed_run_has_no_dropped_groups_of_steps_that_it_repeats(start):
    options = ["val.file=", "save_every=1", "save_rollouts=0"]
    run_dir = start("total_training_steps=1", *options)
    for step in (1, 2):
        (run_dir / f"rollouts/dropped_0000{step}.jsonl").touch()
    start("total_training_steps=2", *options)
    assert [path.name for path in (run_dir / "rollouts").iterdir()] == ["dropped_00001.jsonl"]


# ---- the page ----

def test_the_page_has_groups_with_outcomes_and_responses_with_all_that_was_given(make_page):
    dropped = [make_record(9, texts=None, advantage=None, dropped="all correct")] * 2
    masked = make_record(4, finish_reason="length", final_reward=0.5, advantage=[1.0, -2.0])
    masked["token_stats"] = None  # by overlong filtering
    kept, other = page_data(make_page([make_record(4), masked], dropped))
    assert (kept["outcome"], kept["prompt"], kept["answer"]) == ("trained", "1+5?", "6")
    first, second = kept["responses"]
    assert first["facts"] == {
        "score": "1", "penalty": "-0.25", "reward": "0.75", "advantage": "1.5",
        "parsed": "6", "tokens": "2", "finish": "stop", "trained in update": "2"}
    assert first["flags"] == {"clip_frac_high": [0]} and first["texts"] == ["6", "<eos>"]
    assert second["text"] == "6" and "trained in update" not in second["facts"]
    assert second["facts"]["KL penalty"] == "-0.25" and second["facts"]["finish"] == "length"
    assert second["facts"]["advantage"] == "-2 to 1"
    assert other["outcome"] == "all correct" and len(other["responses"]) == 2
    assert other["responses"][0]["text"] == "6" and "values" not in other["responses"][0]


def test_numbers_take_16_bits_each():
    assert quantise([0.0, 3.0, 1.0]) == [0.0, 3.0, "AAD//1VV"]  # 0, 65535, 21845
    assert quantise([2.5]) == [2.5, 2.5, "AAA="] and quantise([]) == [0.0, 0.0, ""]


def test_a_token_takes_at_most_19_bytes_of_the_page(make_page):
    """So that 512 responses of 2,000 tokens stay below 20 MB."""
    def size(count: int) -> int:
        words = [f"{i:x}"[::-1].ljust(4) for i in range(count)]
        return make_page([make_record(texts=words, advantage=0.1)]).stat().st_size
    assert (size(2000) - size(1000)) / 1000 < 19


def test_the_page_says_which_code_made_the_step(make_page, tmp_path):
    (tmp_path / "a&b/code").mkdir(parents=True)
    for step, name in ((1, "losses.py"), (3, "<b>.py"), (4, "reward.py")):
        (tmp_path / f"a&b/code/from_step_{step:05d}.patch").write_text(
            f"commit abc\n\ndiff --git a/{name} b/{name}\n")
    page = make_page([make_record()]).read_text()
    assert "<br>commit abc, with changes in &lt;b&gt;.py</span>" in page


def test_no_markup_of_the_policy_is_live(make_page):
    """The page has the same tags, whatever a text holds."""
    harmless = tags(make_page([make_record()]))
    hostile = make_record(texts=(HOSTILE, HOSTILE), response=HOSTILE, prompt=HOSTILE, pred=HOSTILE,
                          answer=HOSTILE, finish_reason=HOSTILE)
    plain = make_record(1, texts=None, response=HOSTILE)
    page = make_page([hostile, plain], [make_record(2, None, None, dropped=HOSTILE) | {
        "response": HOSTILE}])
    assert tags(page) == harmless and ("title", []) in harmless
    text = page.read_text(encoding="utf-8")
    assert not set(re.findall(r"[\x00-\x09\x0b-\x1f]", text))
    assert page_data(page)[0]["responses"][0]["texts"] == [HOSTILE, HOSTILE]
    assert "a&amp;b, step 3" in text


def test_a_run_of_an_older_version_shows_its_texts(make_page):
    (group,) = page_data(make_page([make_record(texts=None)]))
    assert group["outcome"] == "trained" and group["responses"][0]["text"] == "6"


def test_what_cannot_be_shown_is_one_line(make_page, tmp_path):
    page = make_page([make_record()])
    for step, records, message in (
            (4, [], r"step_00004.jsonl: no such file: the saved steps are 3"),
            (3, ["{}"], r"step_00003.jsonl:1: not a response as a run saves it \(KeyError"),
            (3, [make_record(), "[]"], r"step_00003.jsonl:2: a JSON object"),
            (3, [make_record(score="1")], r"step_00003.jsonl:1: not a response")):
        with pytest.raises(SystemExit, match=f"error: .*{message}") as error:
            make_page(records, (), step)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="--step shows a step of one run, 2 are named"):
        plot.plot_step([str(page.parent)] * 2, 3, page, ())


# ---- in a browser ----

@pytest.fixture
def browse(tmp_path):
    """`browse(page, "#entropy")`: the page's HTML after its script has run, in a real browser."""
    if not BROWSER:
        pytest.skip("no browser here: install chromium")

    def browse(page: Path, address: str = "", *options: str) -> str:
        done = subprocess.run(
            [BROWSER, "--headless", "--no-sandbox", f"--user-data-dir={tmp_path / 'profile'}",
             *(options or ["--dump-dom"]), f"file://{page}{address}"],
            capture_output=True, timeout=120, check=True)
        return done.stdout.decode()
    return browse


def shaded(dom: str) -> list[tuple[str, str, str]]:
    """Class, colour and text of each token that is shown."""
    return re.findall(r'<span(?: class="(\w*)")?(?: style="(?:background-color: ([^;]*);)?")?>([^<]*)'
                      r'</span>(?=<span|</pre>)', "".join(
                          re.findall(r'<pre class="tokens">.*?</pre>', dom, re.DOTALL)))


@pytest.mark.slow
def test_in_a_browser_the_address_selects_shading_and_group(make_page, browse):
    page = make_page([make_record(), make_record(1, response="7", texts=("7\n", "<b>", "é"))],
                     [make_record(2, texts=None, advantage=None, dropped="all wrong")])
    dom = browse(page)
    assert dom.count("<details") == 3 and dom.count("<details open") == 1
    assert re.findall('class="outcome[^>]*>([^<]*)', dom) == ["trained", "trained", "all wrong"]
    assert 'class="on">advantage after the clip' in dom and "data:image/png" in dom
    assert shaded(dom) == [("clipped", "", "6"), ("", "rgba(0, 110, 190, 0.565)", "&lt;eos&gt;")]
    assert "penalty <b>-0.25</b>" in dom and "finish <b>stop</b>" in dom
    dom = browse(page, "#entropy-2")
    assert 'class="on">entropy' in dom and dom.count("<details open") == 2
    assert [text for _, _, text in shaded(dom)] == ["6", "&lt;eos&gt;", "7↵\n", "&lt;b&gt;", "é"]
    assert {color for _, color, _ in shaded(dom)} == {"rgba(130, 50, 170, 0.19)"}
    dom = browse(page, "#ratio-3")
    assert [color for _, color, _ in shaded(dom)] == ["rgba(0, 110, 190, 0.75)", ""]
    assert dom.count("<pre>6</pre>") == 1  # the dropped group has texts only
    assert '<div class="controls">' in dom and not re.search('id="token"[^>]*>no figures', dom)
    dom = browse(make_page([make_record(texts=None)]), "")
    assert 'class="controls" style="display: none;"' in dom
    assert re.search('id="token"[^>]*>no figures of tokens', dom)


@pytest.mark.slow
def test_in_a_browser_clicks_switch_shading_and_open_groups(make_page, browse):
    page = make_page([make_record(), make_record(1, response="7", texts=("7", "<b>"))])
    policy = r'<meta http-equiv="Content-Security-Policy".*?>'  # would not allow this user
    user = """<script>
      document.querySelector('.modes a[href="#ratio"]').click();
      document.querySelectorAll("summary")[1].click();
      setTimeout(() => document.querySelectorAll(".tokens")[1].firstChild.dispatchEvent(
        new MouseEvent("mouseover", {bubbles: true})), 100);
    </script></body>"""
    page.write_text(re.sub(policy, "", page.read_text()).replace("</body>", user))
    dom = browse(page, "", "--virtual-time-budget=1000", "--dump-dom")
    assert 'class="on">ratio' in dom and dom.count("<details open") == 2
    assert [(color, text) for _, color, text in shaded(dom)] == [
        ("rgba(0, 110, 190, 0.75)", "6"), ("", "&lt;eos&gt;"),
        ("rgba(0, 110, 190, 0.75)", "7"), ("", "&lt;b&gt;")]
    assert re.search('id="token"[^>]*>token 0 "7"   probability 0.250   entropy 0.500   ratio 1.30'
                     '   advantage 1.50   clip_frac_high<', dom)


@pytest.mark.slow
def test_in_a_browser_hostile_text_does_nothing(make_page, browse):
    page = make_page([make_record(texts=(HOSTILE, HOSTILE), prompt=HOSTILE, pred=HOSTILE)])
    dom = browse(page, "#entropy")
    assert "<title>a&amp;b, step 3</title>" in dom and dom.count("<img") == 1
    assert dom.count("<script") == page.read_text().count("<script") == 2
    assert dom.count("&lt;img src=x onerror=") >= 4  # seen in prompt, answer and both tokens
    assert dom.count("\\u{0}\\u{1b}[31m\\u{202e}\\u{2028}\\u{d800}") >= 4
    shown = re.sub("<script.*?</script>", "", dom, flags=re.DOTALL)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e\u2028\ufffd]", shown)
    # the second wall: a tag that did get in would not run, nor reach the network
    live = page.with_name("live.html")
    live.write_text(page.read_text().replace(
        '<div id="groups">', '<script>document.title="live"</script><img src=x onerror='
        '"document.title=\'live\'"><div id="groups">'))
    assert "<title>a&amp;b, step 3</title>" in browse(live)


@pytest.mark.slow
def test_512_responses_of_2000_tokens_are_20_MB_and_open_in_2_seconds(make_page, browse, tmp_path):
    words = [f"{i:x}"[::-1].ljust(4) for i in range(2000)]
    page = make_page([make_record(i // 16, texts=words, response="".join(words), tokens=2000,
                                  advantage=0.1 * i) for i in range(512)])
    assert page.stat().st_size < 20e6
    empty = tmp_path / "empty.html"
    empty.write_text("<p>nothing")

    def seconds(page: Path) -> float:
        start = time.perf_counter()
        browse(page, "", f"--screenshot={tmp_path / 'shot.png'}")
        return time.perf_counter() - start
    browse(empty)  # makes the profile
    took = min(seconds(page) for _ in range(3)) - min(seconds(empty) for _ in range(3))
    print(f"{page.stat().st_size / 1e6:.1f} MB, open after {took:.2f} s")
    assert took < 2


# ---- around the responses ----

def test_the_parts_of_a_reward_are_among_the_facts_of_a_response(make_page):
    (group,) = page_data(make_page([make_record(**{"reward/format": 0.25, "reward/note": "ok"})]))
    facts = group["responses"][0]["facts"]
    assert (facts["reward/format"], facts["reward/note"]) == ("0.25", "ok")


def test_the_page_has_the_figures_of_its_step(make_page):
    assert "<td>reward/mean<td>0.5" in make_page([make_record()]).read_text()


def test_pages_of_several_steps_are_linked(make_page, tmp_path):
    make_page([make_record()])
    for step in (4, 9):
        (tmp_path / f"a&b/rollouts/step_{step:05d}.jsonl").write_text(
            json.dumps(make_record(step=step)) + "\n")
    page = make_page([], [], 3, "4", "9")
    links = [re.findall(r'<a href="(step_\d+.html)">', page.with_name(name).read_text())
             for name in ("step_00003.html", "step_00004.html", "step_00009.html")]
    assert links == [["step_00004.html"], ["step_00003.html", "step_00009.html"],
                     ["step_00004.html"]]
