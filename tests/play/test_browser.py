"""The page of `chargpt play` in a real browser, headless: what its reader sees and can do."""

import copy
import functools
import re
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from pages import CHROMIUM
from players import ALPHABET, PROMPT, make_player
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from serving import NAMES, SECONDS, Site, sample, wait_until

from chargpt.attention import GroupedQueryAttention
from chargpt.play import look, server
from chargpt.play.engine import Batch, Event, Player

QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
QUIET += ["--disable-background-networking", "--disable-component-update"]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: write make browser")

STEPS = 0.5, 0.2, 0.1, 0.05, 0.02, 0.005
TEXT = "GABE,\na bad cafe"  # to compare by surprise
MARKUP = "<img src=x onerror=alert(1)>"  # also the name of a model, which has no weights
NARROW = {"width": 360, "height": 800}
WIDTH = 8  # of the model without weights: no other has it, so that JAX has no trace of it
SENT: list[Event] = []  # what a browser was sent of the texts
Visit = Callable[..., Page]


def named(name: str, player: Player) -> Player:
    player = copy.copy(player)
    player.name = name
    return player


@functools.cache
def players() -> dict[str, Player]:
    """The models on the page; the first six, of every type, are chosen."""
    windows = "model.num_layers=2", "model.window=5", "model.window_pattern=LG"
    letters = "".join(sorted(set(ALPHABET + MARKUP)))
    return {name: make_player(name) for name in NAMES} | {
        "selective": make_player("selective", *windows),
        MARKUP: named(MARKUP, make_player("mqa", f"model.d_model={WIDTH}", alphabet=letters)),
    }


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    weights, as_sent = GroupedQueryAttention.attention_weights, server.as_sent

    def blind(layer: GroupedQueryAttention, *asked: Any) -> Any:
        return None if layer.d_model == WIDTH else weights(layer, *asked)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GroupedQueryAttention, "attention_weights", blind)
        patch.setattr(server, "as_sent", lambda event: SENT.append(event) or as_sent(event))
        with Site(list(players().values()), slots=1) as site:
            yield site


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def allowed() -> set[str]:
    """What a test provokes: beginnings of lines that the browser may write."""
    return set()


@pytest.fixture
def visit(browser: Browser, site: Site, allowed: set[str]) -> Iterator[Visit]:
    """The page as a browser shows it that has never seen it.

    At the end, no error may have been written, no policy broken, and no other host asked.
    """
    problems: list[str] = []
    asked: set[str] = set()
    pages: list[Page] = []
    ports = {site.port}

    def visit(at: Site = site, **options: Any) -> Page:
        page = browser.new_page(**options)
        page.set_default_timeout(1000 * SECONDS)
        page.on("console", lambda line: problems.append(line.text) if line.type == "error" else 0)
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on("dialog", lambda dialog: problems.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: asked.add(urlsplit(request.url).netloc))
        page.add_init_script(
            "addEventListener('securitypolicyviolation', event => "
            "console.error(`policy: ${event.violatedDirective}`))"
        )
        ports.add(at.port)
        pages.append(page)
        page.goto(f"http://127.0.0.1:{at.port}/")
        expect(page.locator("main")).not_to_have_attribute("inert", "")
        return page

    yield visit
    for page in pages:
        page.close()
    assert [line for line in problems if not line.startswith(tuple(allowed))] == []
    assert asked <= {f"127.0.0.1:{port}" for port in ports}


expect.set_options(timeout=1000 * SECONDS)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that take their time: no text of 2,000 characters ends within a test."""
    draw = Batch.draw

    def draw_slowly(batch: Batch, *args: Any) -> Any:
        time.sleep(0.02)
        return draw(batch, *args)

    monkeypatch.setattr(Batch, "draw", draw_slowly)


def choose(page: Page, *names: str) -> None:
    """These models and no others."""
    for wanted in False, True:  # there is room for six
        for chip in page.locator(".chip").all():
            if (chip.locator(".name").inner_text() in names) == wanted:
                chip.locator("input").set_checked(wanted)


def write(page: Page, prompt: str = PROMPT, length: int = 20, **fields: Any) -> None:
    """Continue, without waiting for the end."""
    for name, value in {"prompt": prompt, "length": length, **fields}.items():
        page.locator(f"#{name}").fill(str(value))
    page.locator("#continue").click()


def finished(page: Page, **fields: Any) -> list[Event]:
    """Continue until the end; the events that the page was sent."""
    SENT.clear()
    write(page, **fields)
    expect(page.locator("#status")).to_have_text("Finished")
    return list(SENT)


def texts(page: Page) -> list[str]:
    return page.locator(".card .text").evaluate_all("boxes => boxes.map(box => box.textContent)")


def characters(page: Page, card: int = 0) -> Locator:
    return page.locator(".card").nth(card).locator(".c")


def told(events: list[Event], model: int = 0) -> list[Event]:
    """What a model said of every character."""
    return [read for event in events if event["model"] == model for read in event.get("read", [])]


def strengths(strip: Locator) -> list[float]:
    percents = strip.locator(".w").evaluate_all(
        "spans => spans.map(span => span.style.getPropertyValue('--strength'))"
    )
    return [float(percent.removesuffix("%")) / 100 for percent in percents]


def glyph(character: str) -> str:
    return {" ": "␣", "\n": "↵"}.get(character, character)


# ---- continuing


def test_every_card_streams_what_chargpt_sample_writes_coloured_by_probability(
    visit: Visit,
) -> None:
    page = visit()
    sent = finished(page, length=24, seed=3)
    expected = [sample(players()[name], prompt=PROMPT, num_chars=24, seed=3) for name in NAMES]
    assert texts(page) == [PROMPT + text for text in expected]
    for number in range(len(NAMES)):
        read = told(sent, number)
        tints = [f"p{sum(one['p'] < step for step in STEPS)}" if one else "" for one in read]
        shown = characters(page, number).evaluate_all("all => all.map(c => c.className)")
        assert [" ".join(re.findall(r"\bp\d", classes)) for classes in shown] == tints
        own = [event for event in sent if event["model"] == number]
        size = own[-2]["cache_bytes"]
        size = f"{size} B" if size < 1024 else f"{round(size / 1024, 1):g} KiB"
        card = page.locator(".card").nth(number)
        expect(card.locator(".rate")).to_have_text(
            re.compile(rf"^[\d,]+ characters/s · cache {re.escape(size)}$")
        )
        expect(card.locator(".status")).to_have_text("done")
    assert len(set(tints)) > 3
    page.locator("#colour").uncheck()
    colours = characters(page).evaluate_all("all => all.map(c => getComputedStyle(c).background)")
    assert all(colour.startswith("rgba(0, 0, 0, 0)") for colour in colours)


def test_stop_and_escape_end_the_streams_and_free_the_slots(
    visit: Visit, site: Site, slow: None
) -> None:
    page = visit()
    for stop in page.locator("#stop").click, lambda: page.keyboard.press("Escape"):
        write(page, length=2000)
        expect(page.locator("#status")).to_have_text("6 models are writing")
        expect(page.locator(".card .rate").last).to_contain_text("characters/s")
        assert site.streams.running.total() == 6
        stop()
        expect(page.locator("#status")).to_have_text("Stopped")
        expect(page.locator(".card .status")).to_have_text(["stopped"] * 6)
        wait_until(lambda: site.streams.running.total() == 0)
        expect(page.locator("#stop")).to_be_disabled()
        expect(page.locator("#continue")).to_be_focused()
    assert all(len(PROMPT) < len(text) < 2000 for text in texts(page))


def test_again_takes_the_next_seed(visit: Visit) -> None:
    page = visit()
    choose(page, "standard")
    finished(page, length=12, seed=4)
    page.locator("#again").click()
    expect(page.locator("#seed")).to_have_value("5")
    again = PROMPT + sample("standard", prompt=PROMPT, num_chars=12, seed=5)
    expect(page.locator(".card .text")).to_have_text(again)


def test_a_prompt_that_is_edited_while_texts_are_written_is_continued(
    visit: Visit, slow: None
) -> None:
    page = visit()
    choose(page, "standard", "mla")
    write(page, length=2000)
    expect(page.locator("#status")).to_have_text("2 models are writing")
    page.locator("#length").fill("8")
    page.locator("#prompt").press("Home")
    for key in "ArrowRight", "ArrowRight", "c", "Delete":
        page.keyboard.press(key)
    expect(page.locator("#prompt")).to_have_value("GAcE bad")
    expect(page.locator("#status")).to_have_text("2 models are writing")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#status")).to_have_text("Finished")
    assert texts(page) == [
        "GAcE bad" + sample(name, prompt="GAcE bad", num_chars=8) for name in ("standard", "mla")
    ]


def test_what_the_server_refuses_is_said_in_words(visit: Visit, allowed: set[str]) -> None:
    page = visit()
    allowed.add("Failed to load resource: the server responded with a status of 400")
    write(page, temperature=-1)
    expect(page.locator("#alert")).to_contain_text("temperature: Input should be greater")
    expect(page.locator("#stop")).to_be_disabled()
    choose(page)
    page.locator("#continue").click()
    expect(page.locator("#alert")).to_have_text("No model is chosen: tick at least one.")


def test_a_server_that_stops_is_said_in_words(visit: Visit, slow: None, allowed: set[str]) -> None:
    allowed.add("Failed to load resource: net::ERR_CONNECTION_REFUSED")
    with Site([make_player("standard")], slots=1) as stopping:
        page = visit(stopping)
        write(page, length=2000)
        expect(page.locator("#status")).to_have_text("One model is writing")
    expect(page.locator("#alert")).to_contain_text("The server went away before the text")
    expect(page.locator(".card .status")).to_have_text("cut off")
    expect(page.locator("#status")).to_have_text("Not finished")
    page.locator("#continue").click()
    expect(page.locator("#alert")).to_contain_text("The server does not answer")
    assert texts(page)[0].startswith(PROMPT)
    page.locator("#tab-surprise").click()
    page.locator("#compare").click()
    expect(page.locator("#surprise-alert")).to_contain_text("The server does not answer")


def test_six_models_at_most_are_chosen_and_their_colours_differ(visit: Visit) -> None:
    page = visit()
    name, another = page.locator(".chip", has_text="standard"), page.locator(".chip").nth(6)
    expect(another.locator("input")).to_be_disabled()
    expect(page.locator("#models-note")).to_have_text("6 at most")
    name.locator("input").uncheck()
    another.locator("input").check()
    shown = [*NAMES[1:], MARKUP]
    expect(page.locator(".card .name")).to_have_text(shown)
    colours = page.locator(".card").evaluate_all("all => all.map(c => c.style.cssText)")
    assert len(set(colours)) == 6
    finished(page, length=8)
    assert texts(page)[5] == PROMPT + sample(players()[MARKUP], prompt=PROMPT, num_chars=8)
    page.reload()
    expect(page.locator(".card .name")).to_have_text(shown)
    expect(page.locator("#prompt")).to_have_value(PROMPT)


def test_markup_stays_text(visit: Visit) -> None:
    page = visit()
    choose(page, MARKUP)
    finished(page, prompt=MARKUP, length=30, temperature=2)
    (text,) = texts(page)
    assert text == MARKUP + sample(players()[MARKUP], prompt=MARKUP, num_chars=30, temperature=2.0)
    characters(page).nth(40).click()
    page.locator("#tab-surprise").click()
    page.locator("#surprise-text").fill(MARKUP)
    page.locator("#compare").click()
    expect(page.locator(".sheet .text")).to_have_text(MARKUP)
    expect(page.locator(".sheet .name")).to_have_text(MARKUP)
    assert page.locator("img").count() == 0


# ---- looking inside


def test_pointing_at_a_character_shows_what_the_model_said_of_it_and_what_it_read(
    visit: Visit,
) -> None:
    page = visit()
    choose(page, "standard")
    sent = finished(page, length=4)
    (text,), at = texts(page), 10
    read = told(sent)[at]
    expect(page.locator("#hint")).to_be_visible()
    characters(page).nth(at).hover()
    expect(page.locator("#where")).to_have_text("standard, character 11")
    shown = page.locator("#probability").inner_text()
    assert float(shown.removesuffix("%").removeprefix("< ")) / 100 == pytest.approx(
        max(read["p"], 1e-4), rel=0.06
    )
    nats = float(page.locator("#nats").inner_text().removesuffix(" nats"))
    assert nats == pytest.approx(-np.log(read["p"]), abs=0.006)
    alternatives = page.locator("#alternatives b")
    expect(alternatives).to_have_text([glyph(character) for character, _ in read["top"]])
    assert len(read["top"]) == 5
    expect(page.locator("#attention")).not_to_have_class("stale")
    expect(page.locator("#weights .strip")).to_have_text(text[:at])
    weights = look.attention(players()["standard"], text[:at])["weights"]
    np.testing.assert_allclose(
        strengths(page.locator("#weights .strip")), np.sqrt(np.mean(weights[0], 0)), atol=1e-3
    )
    expect(page.locator("#bias")).to_be_hidden()
    characters(page).nth(0).hover()
    expect(page.locator("#note")).to_contain_text("Nothing came before the first character")
    expect(page.locator("#attention")).to_be_hidden()


def test_the_arrow_keys_move_from_character_to_character_and_escape_unpins(visit: Visit) -> None:
    page = visit()
    choose(page, "standard")
    finished(page, prompt="GABE\na bad\nabc", length=1)
    where, box = page.locator("#where"), page.locator(".card .text")
    box.focus()
    for key, character in [
        ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowDown", 7), ("ArrowDown", 13),
        ("ArrowUp", 7), ("End", 15), ("ArrowLeft", 14), ("Home", 1), ("ArrowLeft", 1),
    ]:  # fmt: skip
        box.press(key)
        expect(where).to_have_text(f"standard, character {character}")
        expect(page.locator(".c.pinned")).to_have_count(1)
    box.press("ArrowRight")
    expect(page.locator("#say")).to_have_text(re.compile(r"^A, .*\d%$"))
    characters(page).nth(5).hover()  # what is pinned stays
    expect(where).to_have_text("standard, character 2")
    box.press("Escape")
    expect(page.locator("#hint")).to_be_visible()
    expect(page.locator(".c.pinned")).to_have_count(0)
    page.locator("#tab-continue").press("ArrowRight")
    expect(page.locator("#panel-surprise")).to_be_visible()
    expect(page.locator("#tab-surprise")).to_be_focused()


def test_another_character_can_be_written_instead(visit: Visit) -> None:
    page = visit()
    choose(page, "standard", "selective")
    sent = finished(page, prompt="GABE", length=10)
    (before, _), at = texts(page), len(PROMPT) - 1
    other = told(sent)[at]["top"][2][0]
    characters(page).nth(at).click()
    with page.expect_response("**/continue"):
        page.locator("#alternatives button").nth(2).click()
    prompt = before[:at] + other
    expect(page.locator("#prompt")).to_have_value(prompt)
    expect(page.locator("#status")).to_have_text("Finished")
    names = "standard", "selective"
    assert texts(page) == [
        prompt + sample(players()[name], prompt=prompt, num_chars=10) for name in names
    ]
    expect(page.locator("#where")).to_have_text(f"standard, character {at + 1}")
    expect(characters(page).nth(at)).to_have_class(re.compile("pinned"))
    expect(page.locator(".card .text").first).to_be_focused()
    if other != " ":
        expect(page.locator("#glyph")).to_have_text(glyph(other))


def test_weights_and_bias_of_one_head_of_a_layer_and_of_all(visit: Visit) -> None:
    page = visit()
    choose(page, "selective", "standard", MARKUP)
    finished(page, length=4)
    at = 10
    text = texts(page)[1][:at]
    characters(page, 1).nth(at).click()
    answer = look.attention(players()["selective"], text)
    weights, bias = page.locator("#weights .strip"), page.locator("#bias .strip")
    expect(weights).to_have_text(text)
    expect(page.locator("#head-label")).to_be_hidden()
    mean = np.mean(answer["weights"][1], axis=0)
    np.testing.assert_allclose(strengths(weights), np.sqrt(mean), atol=1e-3)
    page.locator("#modes").get_by_text("one head").click()
    page.locator("#layer").select_option("0")
    page.locator("#head").select_option("2")
    np.testing.assert_allclose(strengths(weights), np.sqrt(answer["weights"][0][2]), atol=1e-3)
    written = np.array(answer["bias"][0][2], float)  # NaN beyond the window
    most = np.nanmax(np.abs(written))
    np.testing.assert_allclose(strengths(bias), np.nan_to_num(np.abs(written)) / most, atol=1e-3)
    assert np.isnan(written).sum() == 5
    bias.locator(".w").first.hover()
    expect(page.locator("#bias .caption")).to_have_text("G 10 back: out of sight")
    bias.locator(".w").last.hover()
    expect(page.locator("#bias .caption")).to_contain_text(" 1 back: ")
    page.locator("#modes").get_by_text("all heads").click()
    expect(page.locator("#weights .labels span")).to_have_count(8)
    page.locator("#weights canvas").hover(position={"x": 4, "y": 12 * 6.9})
    expect(page.locator("#weights .caption")).to_have_text(re.compile("^L1 H1: G 10 back: .*%$"))
    expect(page.locator("#layer-label")).to_be_hidden()
    characters(page, 0).nth(at).click()
    expect(page.locator("#bias")).to_be_hidden()
    expect(page.locator("#weights .labels span")).to_have_count(4)
    characters(page, 2).nth(at).click()
    expect(page.locator("#attention-note")).to_have_text("mqa attention has no weights to show.")
    expect(page.locator("#attention")).to_be_hidden()
    expect(page.locator("#alternatives b")).to_have_count(5)


# ---- comparing by surprise


def test_surprise_is_summed_charted_and_shown_where_models_differ(
    visit: Visit, allowed: set[str]
) -> None:
    page = visit()
    allowed.add("Failed to load resource: the server responded with a status of 400")
    page.locator("#tab-surprise").click()
    page.locator("#surprise-text").fill(TEXT)
    page.locator("#compare").click()
    found = [look.surprise(players()[name], TEXT) for name in NAMES]
    cells = page.locator("#sums tr")
    expect(cells).to_have_count(6)
    best = min(answer["mean"] for answer in found)
    for row, name, answer in zip(cells.all(), NAMES, found, strict=True):
        more = "best" if answer["mean"] == best else f"+{answer['mean'] - best:.3f}"
        shown = row.locator("th, td").all_inner_texts()
        assert shown == [name, f"{answer['sum']:.1f}", f"{answer['mean']:.3f}", more]
    expect(page.locator(".sheet .text")).to_have_text([TEXT] * 6)
    expect(page.locator("polyline")).to_have_count(6)
    spread = np.ptp(np.array([answer["nats"][1:] for answer in found]), axis=0)
    widest = 1 + int(np.argmax(spread))
    places = page.locator("#places button")
    expect(places).to_have_count(8)
    expect(places.first.locator("mark")).to_have_text(glyph(TEXT[widest]))
    places.first.hover()
    expect(page.locator(".sheet .c.at")).to_have_count(6)
    expect(page.locator("#pointed")).to_contain_text(f"character {widest + 1}, nats:")
    page.locator(".sheet .text").first.press("End")
    expect(page.locator("#pointed")).to_contain_text(f"character {len(TEXT)}, nats:")
    choose(page, "standard")  # a shorter text: what was marked is forgotten
    page.locator("#surprise-text").fill("ab")
    page.locator("#compare").click()
    expect(page.locator(".sheet .text")).to_have_text(["ab"])
    page.locator(".sheet .text").press("ArrowUp")
    expect(page.locator("#differences")).to_be_hidden()
    page.locator("#surprise-text").fill("a")
    page.locator("#compare").click()
    expect(page.locator("#surprise-alert")).to_contain_text("text: has one character")


# ---- looks


def background(page: Page) -> str:
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_the_theme_is_that_of_the_system_until_one_is_chosen_which_is_kept(visit: Visit) -> None:
    page = visit(color_scheme="light")
    light = background(page)
    expect(page.locator("#theme")).to_have_text("Dark")
    page.emulate_media(color_scheme="dark")
    expect(page.locator("#theme")).to_have_text("Light")
    dark = background(page)
    assert dark != light
    page.locator("#theme").click()
    assert background(page) == light
    page.reload()
    expect(page.locator("#theme")).to_have_text("Dark")
    assert background(page) == light
    page.locator("#theme").click()
    page.emulate_media(color_scheme="light")
    assert background(page) == dark


def test_nothing_is_wider_than_a_narrow_screen(visit: Visit) -> None:
    page = visit(viewport=NARROW)
    finished(page, length=40)
    characters(page, NAMES.index("selective")).nth(20).click()
    expect(page.locator("#bias .strip")).to_be_visible()
    wide = "document.documentElement.scrollWidth"
    for mode in "one head", "all heads":
        page.locator("#modes").get_by_text(mode).click()
        assert page.evaluate(wide) <= 360
    page.locator("#tab-surprise").click()
    page.locator("#surprise-text").fill(TEXT)
    page.locator("#compare").click()
    expect(page.locator("polyline")).to_have_count(6)
    assert page.evaluate(wide) <= 360


CONTRASTS = """() => {
  const numbers = text => {
    const [r, g, b, alpha = 1] = text.match(/[-\\d.e]+/g).map(Number);
    return [...[r, g, b].map(v => text.startsWith('color(') ? 255 * v : v), alpha];
  };
  const over = ([r, g, b, alpha], under) =>
    [r, g, b].map((v, k) => alpha * v + (1 - alpha) * under[k]);
  const luminance = colour => colour
    .map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
  const paper = element => {
    const under = element.parentElement ? paper(element.parentElement) : [255, 255, 255];
    return over(numbers(getComputedStyle(element).backgroundColor), under);
  };
  const own = element => element.value && element.tagName !== 'BUTTON' && element.tagName !== 'LI'
    || [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
  const found = [];
  for (const element of document.querySelectorAll('body *')) {
    const style = getComputedStyle(element);
    const seen = element.checkVisibility({ visibilityProperty: true, opacityProperty: true });
    if (!seen || style.clipPath !== 'none' || element.closest('option') || !own(element)) continue;
    const under = paper(element);
    const colour = element.namespaceURI.endsWith('svg') ? style.fill : style.color;
    const ink = over(numbers(colour), under);
    const [low, high] = [luminance(ink), luminance(under)].sort((a, b) => a - b);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || size >= 18.66 && style.fontWeight >= 700;
    const what = `${element.tagName} ${element.className} ${element.textContent.slice(0, 30)}`;
    found.push([what, (high + 0.05) / (low + 0.05), large ? 3 : 4.5]);
  }
  return found;
}"""


def test_every_text_stands_out_from_its_background(visit: Visit) -> None:
    page = visit(color_scheme="light")
    finished(page, prompt=f"{PROMPT}\n{PROMPT}", length=150, temperature=2)
    characters(page, NAMES.index("selective")).nth(60).click()
    expect(page.locator("#bias .strip")).to_be_visible()
    seen = []
    for tab in "continue", "surprise":
        page.locator(f"#tab-{tab}").click()
        if tab == "surprise":
            page.locator("#surprise-text").fill(TEXT)
            page.locator("#compare").click()
            expect(page.locator("polyline")).to_have_count(6)
        for scheme in "light", "dark":
            page.emulate_media(color_scheme=scheme)
            found = page.evaluate(CONTRASTS)
            faint = [(what, ratio) for what, ratio, least in found if ratio < least]
            assert not faint, f"{tab}, {scheme}: {faint[:10]}"
            seen += [what for what, _, _ in found]
    for what in "SPAN c p6", "BUTTON", "text", "TEXTAREA", "SPAN w":
        assert any(one.startswith(what) for one in seen), what
