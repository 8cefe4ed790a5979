"""`bara serve --load-from`: adapters that clients load, as into vLLM, and unload."""

import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("fastapi")

import httpx
import torch
from safetensors.torch import load_file, save_file

import bara
from bara.adapter.peft_020 import ASKS_THE_MODEL
from bara.cards.adapter_files import WEIGHTS_FILE
from bara.export.client import Ensemble
from bara.finetuning.load import load_adapter
from bara.language.likelihood import continuation_log_probs
from bara.serving.app import create_app
from bara.serving.limits import Limits
from bara.serving.metrics import Metrics
from bara.serving.problems import Problem
from bara.serving.schemas import LoadRequest
from bara.serving.served import load_served
from bara.serving.shelf import Shelf
from conftest import write_jsonl
from helpers import tiny_llama
from language_models import word_tokenizer, words
from serving import held_predictions, make_adapter, running

KEY = "0123456789abcdef"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module")
def root(served_folders, tmp_path_factory):
    """What clients may load from: copies of adapters that the server does not have."""
    root = tmp_path_factory.mktemp("loadable")
    shutil.copytree(served_folders["pairs"], root / "pairs")
    return root


@pytest.fixture
def client(served_folders, root):
    served = load_served([str(served_folders[name]) for name in ("reviews", "words")])
    app = create_app(served, api_key=KEY, load_from=root, limits=Limits(adapters=3))
    headers = {"Authorization": f"Bearer {KEY}"}
    with running(app) as url, httpx.Client(base_url=url, timeout=30, headers=headers) as client:
        yield client


def load(client, name, path):
    answer = client.post(LOAD, json={"lora_name": name, "lora_path": str(path)})
    assert answer.status_code == 200, answer.text
    return answer.text


def unload(client, name):
    answer = client.post(UNLOAD, json={"lora_name": name})
    assert answer.status_code == 200, answer.text
    return answer.text


def names(client):
    return [model["id"] for model in client.get("/v1/models").json()["data"]]


def refused(client, words, status=400, path=LOAD, **body):
    """The error of a request: one line, without a path of this machine."""
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    message = answer.json()["error"]["message"]
    assert words in message
    assert "/tmp" not in answer.text
    return message


def test_an_adapter_comes_and_goes(client, root, served_folders):
    asked = {"model": "two", "pairs": [["good film", "bad film"]], "num_draws": 3}
    refused(client, "there is no model 'two'", 404, "/v1/predict", **asked)
    for path in ("pairs", root / "pairs", "./other/../pairs", root / "pairs" / "."):
        if "other" in str(path):
            (root / "other").mkdir()
        assert load(client, "two", path) == "Success: LoRA adapter 'two' added successfully."
        assert names(client) == ["reviews", "words", "two"]
        (found,) = client.post("/v1/predict", json=asked).json()["predictions"]
        model, tokenizer, _ = bara.load_adapter(served_folders["pairs"])
        row = dict(tokenizer(*asked["pairs"][0]))
        (expected,) = bara.predict(model, [row], num_draws=3, progress=False).to_records()
        assert found["probabilities"] == pytest.approx(expected["probabilities"], rel=1e-4)
        assert unload(client, "two") == "Success: LoRA adapter 'two' removed successfully."
        assert names(client) == ["reviews", "words"]
    refused(client, "there is no model 'two'", 404, UNLOAD, lora_name="two")


def test_requests_under_way_finish_on_an_adapter_that_is_unloaded(client, monkeypatch):
    load(client, "two", "pairs")
    asked = {"model": "two", "pairs": [["good film", "bad film"]]}
    expected = client.post("/v1/predict", json=asked).json()
    begun, go, _ = held_predictions(monkeypatch)
    with ThreadPoolExecutor(2) as pool:
        under_way = [
            pool.submit(client.post, "/v1/predict", json=asked | {"seed": s}) for s in (0, 1)
        ]
        assert begun.wait(20)
        while "bara_queue_requests 1.0" not in client.get("/metrics").text:
            pass
        unload(client, "two")
        refused(client, "there is no model 'two'", 404, "/v1/predict", **asked)
        go.set()
        answers = [answer.result(30) for answer in under_way]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert expected in [answer.json() for answer in answers]


def test_the_base_is_read_once_and_held_once(served_folders, root):
    """Loaded language models share every weight of the base with the one that was there."""
    shutil.copytree(served_folders["words"], root / "words")
    served = load_served([str(served_folders["words"])])
    shelf = Shelf(served, Limits(), Metrics(), load_from=root)
    for name in ("one", "two"):
        job = shelf.load_job(LoadRequest(lora_name=name, lora_path="words"))
        job.run([job])
        shelf.add(job.result.result())
    assert len(shelf._bases) == 1
    first, *others = (dict(one.model.named_parameters()) for one in shelf.served)
    (base,) = shelf._bases.values()
    places = {parameter.data_ptr() for parameter in base.parameters()}
    for other in others:
        shared = {n for n, p in other.items() if p.data_ptr() == first[n].data_ptr()}
        assert shared == {name for name in first if "lora_" not in name}
        assert {other[name].data_ptr() for name in shared} == places
    # and each generates as the adapter from its folder does
    prompt, options = words(4, 5), {"max_new_tokens": 4, "agreement": False, "num_draws": 3}
    model, tokenizer, _ = bara.load_adapter(served_folders["words"])
    (expected,) = bara.generate(model, tokenizer, [prompt], **options)
    for one in shelf.served:
        (answer,) = bara.generate(one.model, one.tokenizer, [prompt], **options)
        torch.testing.assert_close(answer.token_log_probs, expected.token_log_probs)


def generated(model, tokenizer):
    options = {"max_new_tokens": 4, "agreement": False, "num_draws": 3}
    (answer,) = bara.generate(model, tokenizer, [words(4, 5)], **options)
    return answer.token_log_probs


@pytest.mark.skipif(not ASKS_THE_MODEL, reason="peft 0.20 saves no biases of the base model")
@pytest.mark.parametrize("method", ["bara", "lora"])
def test_biases_that_an_adapter_trained_are_its_own(method, tmp_path):
    """Every adapter answers as from its folder, before and after one with biases came and went."""
    tiny_llama(eos_token_id=2, initializer_range=0.3, attention_bias=True).save_pretrained(
        tmp_path / "base"
    )
    word_tokenizer().save_pretrained(tmp_path / "base")
    folders = {}
    for name, bias in (("first", "none"), ("second", "none"), ("biased", "all"), ("last", "none")):
        folder = tmp_path / "adapters" / name
        folders[name] = make_adapter(tmp_path / "base", folder, "words", method, bias=bias)
        if bias != "none":
            tensors = load_file(folder / WEIGHTS_FILE)
            biases = [key for key in tensors if key.endswith(".bias") and "lora_" not in key]
            assert any(".base_layer." in key for key in biases)
            changed = {key: torch.randn_like(tensors[key]) for key in biases}
            save_file(tensors | changed, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    expected = {name: generated(*load_adapter(folders[name])[:2]) for name in folders}
    assert not torch.allclose(expected["biased"], expected["first"], atol=0.1)
    served = load_served([str(folders["first"])])
    shelf = Shelf(served, Limits(), Metrics(), load_from=tmp_path / "adapters")

    def load_and_compare(name):
        job = shelf.load_job(LoadRequest(lora_name=name, lora_path=name))
        job.run([job])
        shelf.add(job.result.result())
        for one in shelf.served:
            answer = generated(one.model, one.tokenizer)
            torch.testing.assert_close(answer, expected[one.name], rtol=1e-5, atol=1e-5)

    for name in ("second", "biased"):
        load_and_compare(name)
    shelf.remove("biased")
    load_and_compare("last")
    load_and_compare("biased")


def test_a_refused_adapter_leaves_the_shared_base_alone(served_folders, tmp_path):
    for name in ("good", "bad"):
        shutil.copytree(served_folders["words"], tmp_path / name)
    tensors = load_file(tmp_path / "bad" / WEIGHTS_FILE)
    tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(64, 32)
    save_file(tensors, tmp_path / "bad" / WEIGHTS_FILE, metadata={"format": "pt"})
    served = load_served([str(served_folders["words"])])
    shelf = Shelf(served, Limits(), Metrics(), load_from=tmp_path)
    for name in ("good", "bad"):
        job = shelf.load_job(LoadRequest(lora_name=name, lora_path=name))
        if name == "bad":
            with pytest.raises(Problem):
                job.run([job])
        else:
            job.run([job])
            shelf.add(job.result.result())
    expected = generated(*load_adapter(served_folders["words"])[:2])
    for one in shelf.served:
        torch.testing.assert_close(generated(one.model, one.tokenizer), expected)


def test_nothing_is_loaded_from_elsewhere(client, root, served_folders, tmp_path):
    inside = "lora_path must be an adapter's folder inside the one of --load-from"
    elsewhere = served_folders["stars"]
    (root / "link").symlink_to(elsewhere)
    part = shutil.copytree(root / "pairs", root / "part")
    weights = part / "adapter_model.safetensors"
    shutil.move(weights, tmp_path / "weights")
    weights.symlink_to(tmp_path / "weights")
    circle = root / "circle"
    circle.symlink_to(circle)
    (root / "empty").mkdir()
    answers = {
        refused(client, inside, lora_name="x", lora_path=str(path))
        for path in (
            elsewhere,
            f"../{elsewhere.parent.name}/stars",
            f"pairs/../../{elsewhere.parent.name}/stars",
            "link",
            "part",
            "circle",
            "empty",
            "nothing",
            "pairs/adapter_config.json",
            "a\0b",
            "a" * 5000,
            "/etc",
            "~",
        )
    }
    assert len(answers) == 1  # nor does the answer tell what there is
    assert names(client) == ["reviews", "words"]


def test_what_cannot_be_loaded_is_one_clear_line(client, root, caplog):
    named = {"lora_name": "x"}
    refused(client, "lora_path is missing", **named)
    refused(client, "lora_name", lora_name="a b", lora_path="pairs")
    refused(client, "load_inplace must be", **named, lora_path="pairs", load_inplace=True)
    refused(client, "'words' has already been loaded", lora_name="words", lora_path="pairs")
    refused(client, "words was there from the start", path=UNLOAD, lora_name="words")
    damaged = shutil.copytree(root / "pairs", root / "damaged")
    (damaged / "adapter_model.safetensors").write_bytes(b"nothing")
    line = "the adapter cannot be loaded; the server's log says why"
    assert refused(client, "", **named, lora_path="damaged") == line
    assert f"{damaged}: " in caplog.text
    (damaged / "adapter_config.json").write_text("{")
    assert refused(client, "", **named, lora_path="damaged") == line
    assert "adapter_config.json" in caplog.text
    foreign = shutil.copytree(root / "pairs", root / "foreign")
    config = json.loads((foreign / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "somebody/another-model"
    (foreign / "adapter_config.json").write_text(json.dumps(config))
    refused(client, "not on a base model that this server has", **named, lora_path="foreign")
    for number in range(3):
        load(client, f"x{number}", "pairs")
    refused(client, "3 adapters have been loaded", **named, lora_path="pairs")


def test_it_is_off_and_needs_the_key(served_folders, root, failing):
    served = load_served([str(served_folders["reviews"])])
    body = {"lora_name": "x", "lora_path": "pairs"}
    with running(create_app(served)) as url, httpx.Client(base_url=url) as client:
        refused(client, "start it with --load-from", 403, **body)
        refused(client, "start it with --load-from", 403, UNLOAD, lora_name="reviews")
    app = create_app(served, api_key=KEY, load_from=root)
    with running(app) as url, httpx.Client(base_url=url) as client:
        refused(client, "Authorization: Bearer KEY", 401, **body)
        refused(client, "Authorization: Bearer KEY", 401, UNLOAD, lora_name="reviews")
    with pytest.raises(bara.BaraError, match="give api_key too"):
        create_app(served, load_from=root)
    error = failing("serve", served_folders["reviews"], "--load-from", root)
    assert "give --api-key-file too" in error


@pytest.mark.parametrize("method", ["blob", "tfb"])
def test_draws_are_loaded_by_the_command(method, served_folders, root, run, tmp_path):
    """`bara export --load-into`: the client's average is that of the adapter's own draws."""
    base, folder = served_folders["words"].parent / "llama", tmp_path / method
    if method == "tfb":
        plain = make_adapter(base, tmp_path / "lora", "words", "lora", init_lora_weights=False)
        rows = [{"prompt": words(i, 5) + " ", "completion": words(6, 7)} for i in range(10, 20)]
        table = write_jsonl(tmp_path / "texts.jsonl", rows)
        bara.bayesianize(plain, str(table), folder)
    else:
        make_adapter(base, folder, "words", method)
    served = load_served([str(served_folders["words"])])
    (tmp_path / "key").write_text(KEY)
    out = root / f"{method}-draws"
    with running(create_app(served, api_key=KEY, load_from=root)) as url:
        command = ["export", folder, "--mode", "draws", "--num-draws", 3, "--seed", 1]
        command += ["--output", out, "--load-into", url, "--api-key-file", tmp_path / "key"]
        assert f"Loaded 3 draws into {url}" in run(*command)
        ensemble = Ensemble.from_folder(out, url=url, api_key=KEY)
        answer = ensemble.ask(words(4, 5), top=20)
        endings = [f" {words(*numbers)}" for numbers in ((6, 7, 9), (12,), (3, 4))]
        scored = ensemble.score(words(4, 5), endings)
    model, tokenizer, _ = bara.load_adapter(folder)
    ids = tokenizer(words(4, 5), return_tensors="pt")["input_ids"]
    draws = []
    for draw in range(3):
        with torch.no_grad(), bara.sampling(model, seed=1, first_draw=draw):
            draws.append(model(input_ids=ids).logits[0, -1].softmax(-1))
    assert not torch.allclose(draws[0], draws[1], rtol=1e-2)
    mixture = torch.stack(draws).mean(0)
    by_all = set.intersection(*(set(draw.topk(20).indices.tolist()) for draw in draws))
    found = {tokenizer.convert_tokens_to_ids(t): p for t, p in answer.probabilities.items()}
    assert found == pytest.approx({token: float(mixture[token]) for token in by_all}, rel=1e-3)
    assert answer.rest == pytest.approx(1 - float(mixture[list(by_all)].sum()), rel=1e-3)
    # whole answers, against bara's own likelihoods and choices
    pairs = [(ids[0].tolist(), tokenizer(ending)["input_ids"]) for ending in endings]
    likelihoods, _ = continuation_log_probs(model, pairs, num_draws=3, seed=1)
    found = [scored.log_likelihoods[ending] for ending in endings]
    assert found == pytest.approx((likelihoods.logsumexp(0) - math.log(3)).tolist(), rel=1e-4)
    question = {"prompt": words(4, 5), "choices": [ending[1:] for ending in endings]}
    choice = bara.multiple_choice(model, tokenizer, [question], num_draws=3, seed=1)
    found = list(scored.probabilities.values())
    assert found == pytest.approx(choice.probs[0].tolist(), rel=1e-4, abs=1e-6)
    assert scored.epistemic == pytest.approx(choice.epistemic_uncertainty.item(), abs=1e-5)


def test_classes_of_draws_are_averaged(served_folders, root, run, tmp_path):
    """A classifier's draws, asked for by vLLM's `/classify`."""
    folder = make_adapter(
        served_folders["reviews"].parent / "bert", tmp_path / "film", "reviews", "blob"
    )
    served = load_served([str(served_folders["reviews"])])
    (tmp_path / "key").write_text(KEY)
    out, text = root / "film-draws", "a bad plot , poor food"
    with running(create_app(served, api_key=KEY, load_from=root)) as url:
        command = ["export", folder, "--mode", "draws", "--num-draws", 4, "--seed", 2]
        run(*command, "--output", out, "--load-into", url, "--api-key-file", tmp_path / "key")
        ensemble = Ensemble.from_folder(out, url=url, api_key=KEY)
        answer = ensemble.classify(text)
        body = {"model": "draw-1", "input": [text, "good film"]}
        headers = {"Authorization": f"Bearer {KEY}"}
        raw = httpx.post(f"{url}/classify", json=body, headers=headers).json()
    model, tokenizer, _ = bara.load_adapter(folder)
    expected = bara.predict(model, [dict(tokenizer(text))], num_draws=4, seed=2, progress=False)
    assert list(answer.probabilities) == ["no", "yes"]
    found = torch.tensor(list(answer.probabilities.values()))
    torch.testing.assert_close(found, expected.probs[0], atol=1e-5, rtol=1e-4)
    assert answer.epistemic == pytest.approx(expected.epistemic_uncertainty.item(), abs=1e-5)
    assert answer.epistemic > 1e-3
    assert [one["index"] for one in raw["data"]] == [0, 1]
    own = expected.log_probs_draws[1, 0].exp()
    assert raw["data"][0]["probs"] == pytest.approx(own.tolist(), rel=1e-4)
    assert raw["data"][0]["label"] == ["no", "yes"][own.argmax()]
