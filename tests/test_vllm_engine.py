"""vLLM's engine on bounded caches: text for text what ``less.hf`` gives each prompt alone.

These want vLLM, which pins a torch and a transformers of its own: `make test-vllm` makes an
environment and runs them.
"""

import gc
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

import less.hf
from less import Calibration, LessConfig, Sidekick
from less.calibration import NAMES
from less.sidekick.identity import model_identity

NEW = 24
LENGTHS = (230, 37, 140, 75, 1, 90)
LAYERS, Q, K, D = 2, 4, 4, 32


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a random Llama whose texts neither end nor repeat at once."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=Q * D,
        intermediate_size=192,
        num_hidden_layers=LAYERS,
        num_attention_heads=Q,
        num_key_value_heads=K,
        head_dim=D,
        max_position_embeddings=4096,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("vllm") / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    return os.fspath(folder)


@pytest.fixture(scope="module")
def own(model, tmp_path_factory):
    """Cases by name: settings of less."""
    folder = tmp_path_factory.mktemp("less")
    g = torch.Generator().manual_seed(0)
    sidekick = Sidekick.random(LAYERS, Q, K, D, 4, 8, "exp", g)
    sidekick.save_pretrained(folder / "sidekick")

    def normal(factor):
        return torch.randn(K, D, generator=g) * factor

    spaces = [
        dict(
            zip(
                NAMES,
                (normal(0.5), normal(0.3).exp(), normal(0.5), normal(0.3).exp()),
                strict=True,
            )
        )
        for _ in range(LAYERS)
    ]
    about = {"model": model_identity(AutoModelForCausalLM.from_pretrained(model))}
    Calibration(spaces, about).save_pretrained(folder / "calibration")
    h2o = {"name": "H2O", "heavy": 3, "recent": 1, "decay": 0.98}
    return {
        "nothing leaves": {"tokens": 512},
        "h2o": {"tokens": 64, "policy": h2o},
        "less": {"tokens": 64, "policy": h2o, "sidekick": os.fspath(folder / "sidekick")},
        "sinks": {"tokens": 64, "policy": {"name": "SinkRecent", "sinks": 4, "recent": 60}},
        "k4v4, merged": {
            "bytes": 100_000,
            "calibration": os.fspath(folder / "calibration"),
        },
        "layers differ": {"tokens": [48, 80], "policy": h2o},
        "a full layer": {"tokens": 64, "full_layers": 1, "policy": h2o},
    }


@contextmanager
def engine(model, own=None, **settings):
    """An engine in this process; without ``own`` vLLM's own attention."""
    given = {
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "max_model_len": 512,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 512,
        "enable_chunked_prefill": False,
        "kv_cache_memory_bytes": 1 << 26,
    }
    if own is not None:
        given |= {"attention_backend": "CUSTOM", "additional_config": {"less": own}}
    llm = None
    try:
        llm = LLM(model, **(given | settings))
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def prompts(lengths=LENGTHS, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 512, (n,), generator=g).tolist() for n in lengths]


def sampling(new=NEW):
    return SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)


def together(llm, texts, new=NEW):
    made = llm.generate([{"prompt_token_ids": x} for x in texts], sampling(new), use_tqdm=False)
    assert [x.num_cached_tokens for x in made] == [0] * len(texts)  # no prefix is cached
    return [list(x.outputs[0].token_ids) for x in made]


def staggered(llm, texts, every, new=NEW):
    """Request i arrives at step ``every * i``."""
    run, done = llm.llm_engine, {}
    for step in range(10_000):
        if step % every == 0 and step // every < len(texts):
            i = step // every
            run.add_request(str(i), {"prompt_token_ids": texts[i]}, sampling(new))
        for x in run.step():
            if x.finished:
                done[int(x.request_id.split("-")[0])] = list(x.outputs[0].token_ids)
        if len(done) == len(texts):
            return [done[i] for i in range(len(texts))]
    raise AssertionError(f"{len(done)} of {len(texts)} requests are finished")


@pytest.fixture(scope="module")
def alone(model):
    return generator(model)


def generator(model):
    """What transformers generates for each prompt, on a bounded cache or without one."""
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    known = {}

    def generate(texts, own=None, chunk=None, new=NEW):
        key = json.dumps([texts, own, chunk, new])
        if key not in known:
            known[key] = [one(x, own, chunk, new) for x in texts]
        return known[key]

    def one(text, own, chunk, new):
        ids = torch.tensor([text])
        given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new, "do_sample": False}
        given |= {"eos_token_id": None, "pad_token_id": 0}
        if chunk:
            given["prefill_chunk_size"] = chunk
        if own is None:
            return plain.generate(ids, **given)[0, len(text) :].tolist()
        cache = LessConfig.from_settings(own).cache(plain, max_tokens=512)
        with less.hf.attach(plain, cache):
            return plain.generate(ids, past_key_values=cache, **given)[0, len(text) :].tolist()

    return generate


def free_blocks(llm):
    core = llm.llm_engine.engine_core.engine_core
    return core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


CASES = ("nothing leaves", "h2o", "less", "sinks", "k4v4, merged", "layers differ", "a full layer")


@pytest.mark.parametrize("case", CASES)
def test_texts_are_those_of_each_prompt_alone(model, own, alone, case):
    texts = prompts()
    wanted = alone(texts, own[case])
    with engine(model, own[case]) as llm:
        free = free_blocks(llm)
        assert together(llm, texts) == wanted
        assert staggered(llm, texts, every=3) == wanted  # on pages that were used
        assert free_blocks(llm) == free
    if case == "nothing leaves":
        with engine(model) as llm:
            assert together(llm, texts) == wanted
    else:
        assert wanted != alone(texts)  # something that counts has left


# Settings, and which of four prompts. Rows of four bits round: where another order of sums moves a
# number over the edge of a code, logits move by hundredths: the first prompt has so close a choice.
OF_SMOLLM2 = {
    "nothing leaves": ({"tokens": 512}, slice(4)),
    "h2o": ({"tokens": 64, "policy": {"name": "H2O", "heavy": 1, "recent": 1}}, slice(4)),
    "less": ({"tokens": 64, "sidekick": "smollm2-135m-instruct"}, slice(4)),
    "k4v4, merged": ({"bytes": 1 << 20}, slice(1, 4)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", OF_SMOLLM2)
def test_texts_of_smollm2_are_those_of_each_prompt_alone(case):
    from less.evaluate import assets

    try:
        folder = os.fspath(assets.smollm2())
    except assets.AssetError as error:
        pytest.skip(str(error))
    text = (Path(__file__).parent.parent / "docs" / "algorithm.md").read_text()
    ids = assets.load_model(folder)[1](text)["input_ids"]
    (own, which), chunk = OF_SMOLLM2[case], 64
    texts = [ids[:230], ids[300:337], ids[400:540], ids[600:675]][which]
    wanted = generator(folder)(texts, own, chunk)
    settings = {
        "enable_chunked_prefill": True,
        "long_prefill_token_threshold": chunk,
        "max_num_batched_tokens": 4 * chunk,
    }
    with engine(folder, own, **settings) as llm:
        assert together(llm, texts) == wanted
        assert staggered(llm, texts, every=2) == wanted
    if case == "nothing leaves":
        with engine(folder, **settings) as llm:
            assert together(llm, texts) == wanted


def test_chunks_of_a_prompt_do_not_depend_on_traffic(model, own, alone):
    texts, case = prompts((230, 37, 140, 75, 96, 90)), own["h2o"]
    wanted = alone(texts, case, chunk=48)
    assert wanted != alone(texts, case)
    settings = {
        "enable_chunked_prefill": True,
        "long_prefill_token_threshold": 48,
        "max_num_batched_tokens": 192,
    }
    with engine(model, case, **settings) as llm:
        assert [together(llm, [x])[0] for x in texts] == wanted  # alone, uncut by vLLM
        assert together(llm, texts) == wanted
        for every in (1, 2, 5):
            assert staggered(llm, texts, every) == wanted


def test_a_text_stops_at_the_longest(model, own, alone):
    texts = prompts((60, 75))
    with engine(model, own["h2o"], max_model_len=80) as llm:
        made = together(llm, texts, new=200)
    assert [len(x) for x in made] == [20, 5]
    assert made == [x[: len(y)] for x, y in zip(alone(texts, own["h2o"]), made, strict=True)]


def test_requests_wait_for_a_page_where_there_are_few(model, own, alone):
    from less.integrations.vllm.backend import Engine

    texts = prompts()
    with engine(model, own["less"]) as llm:
        page = sum(x.layout.nbytes for x in Engine.of(llm.llm_engine.vllm_config).layers)
    # vLLM keeps one page for padding
    with engine(model, own["less"], kv_cache_memory_bytes=3 * page) as llm:
        assert free_blocks(llm) == 2
        assert together(llm, texts) == alone(texts, own["less"])
        assert free_blocks(llm) == 2


def test_half_precision_is_served(model, own):
    with engine(model, own["k4v4, merged"], dtype="bfloat16") as llm:
        made = together(llm, prompts())
    assert all(len(set(x)) > 4 for x in made)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"additional_config": {}}, "additional_config must have 'less'"),
        ({"additional_config": {"less": {"token": 1}}}, r"unknown settings \['token'\]"),
        ({"enable_chunked_prefill": True}, "chunks depend on traffic"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "scheduler_cls must be"),
    ],
)
def test_what_is_not_served_is_refused_when_the_engine_starts(model, own, settings, message):
    with (
        pytest.raises((ValueError, RuntimeError), match=message),
        engine(model, own["h2o"], **settings),
    ):
        pass


def test_a_preemption_is_refused_before_anything_is_lost(model, own, alone):
    texts = prompts((90, 37))
    with engine(model, own["h2o"]) as llm:
        run = llm.llm_engine
        for i, x in enumerate(texts):
            run.add_request(str(i), {"prompt_token_ids": x}, sampling())
        for _ in range(4):
            run.step()
        with pytest.raises(RuntimeError, match="reset_running_requests would compute"):
            run.reset_prefix_cache(reset_running_requests=True)
        done = {}
        while len(done) < len(texts):
            done |= {
                int(x.request_id.split("-")[0]): list(x.outputs[0].token_ids)
                for x in run.step()
                if x.finished
            }
        assert [done[0], done[1]] == alone(texts, own["h2o"])


PLAIN = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, skip_tokenizer_init=True,
          max_model_len=512, max_num_seqs=4, kv_cache_memory_bytes=1 << 26)
given = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
made = llm.generate([{"prompt_token_ids": x} for x in json.loads(sys.argv[2])], given)
ours = sorted(x for x in sys.modules if x.split(".")[0] in ("less", "less_vllm"))
print("MADE", json.dumps([[list(x.outputs[0].token_ids) for x in made], ours]))
"""


def test_an_engine_that_is_not_asked_imports_nothing_and_computes_the_same(model, alone):
    texts = prompts((90, 37))

    def run(plugins):
        done = subprocess.run(
            [sys.executable, "-c", PLAIN, model, json.dumps(texts)],
            env=os.environ | plugins,
            capture_output=True,
            text=True,
            check=False,
        )
        found = [x for x in done.stdout.splitlines() if x.startswith("MADE")]
        assert found, done.stderr
        return json.loads(found[0].removeprefix("MADE"))

    with_us, ours = run({})
    without, none = run({"VLLM_PLUGINS": "no-such-plugin"})
    assert ours == ["less_vllm"]
    assert none == []
    assert with_us == without
    assert with_us == alone(texts, new=16)


def test_the_interfaces_of_vllm_are_those_that_the_backend_was_written_for():
    """A failure names what another vLLM changed."""
    from inspect import signature

    from vllm.config import CacheConfig, ParallelConfig, SchedulerConfig, VllmConfig
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backend import (
        AttentionBackend,
        AttentionImpl,
        AttentionMetadataBuilder,
        CommonAttentionMetadata,
    )
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import CircularBufferSpec

    wanted = {
        AttentionImpl.__init__: "self num_heads head_size scale num_kv_heads alibi_slopes "
        "sliding_window kv_cache_dtype logits_soft_cap attn_type kv_sharing_target_layer_name",
        AttentionImpl.forward: "self layer query key value kv_cache attn_metadata output "
        "output_scale output_block_scale",
        AttentionImpl.process_weights_after_loading: "self act_dtype",
        AttentionMetadataBuilder.__init__: "self kv_cache_spec layer_names vllm_config device",
        AttentionMetadataBuilder.build: "self common_prefix_len common_attn_metadata fast_build",
        AttentionBackend.customize_spec: "spec",
        CircularBufferSpec.max_memory_usage_bytes: "self vllm_config",
        Scheduler.reset_prefix_cache: "self reset_running_requests reset_connector",
    }
    for function, names in wanted.items():
        assert " ".join(signature(function).parameters) == names, function.__qualname__
    read = {
        VllmConfig: "additional_config model_config speculative_config kv_transfer_config "
        "cache_config parallel_config scheduler_config device_config compilation_config",
        CacheConfig: "cache_dtype enable_prefix_caching kv_offloading_size kv_sharing_fast_prefill",
        ParallelConfig: "pipeline_parallel_size prefill_context_parallel_size "
        "decode_context_parallel_size",
        SchedulerConfig: "enable_chunked_prefill long_prefill_token_threshold max_num_seqs "
        "long_prefill_token_threshold_adaptive max_num_batched_tokens max_num_scheduled_tokens "
        "scheduler_cls async_scheduling",
    }
    for config, names in read.items():
        assert set(names.split()) <= set(config.__dataclass_fields__), config.__name__
    assert isinstance(ParallelConfig.use_ubatching, property)
    fields = set(CommonAttentionMetadata.__dataclass_fields__)
    assert fields >= {
        "query_start_loc",
        "query_start_loc_cpu",
        "seq_lens",
        "num_reqs",
        "max_query_len",
        "block_table_tensor",
    }
    assert set(CircularBufferSpec.__dataclass_fields__) >= {
        "block_size",
        "num_kv_heads",
        "num_head_slots",
        "head_size",
        "dtype",
        "state_content_bytes",
        "tokens_per_state",
        "dcp_sharded",
    }
    assert callable(Attention.get_attn_backend)


# -- the server ------------------------------------------------------------------------------------


def asked(url, texts, every=0.0, new=NEW):
    """What a server answers to texts that arrive ``every`` so many seconds."""
    import json
    import time
    import urllib.request
    from concurrent.futures import ThreadPoolExecutor

    from bench.serving.server import NAME

    def ask(i):
        time.sleep(every * i)
        given = {"model": NAME, "prompt": texts[i], "max_tokens": new, "temperature": 0}
        given |= {"ignore_eos": True, "return_token_ids": True}
        request = urllib.request.Request(
            f"{url}/v1/completions",
            json.dumps(given).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as reply:
            return json.loads(reply.read())["choices"][0]["token_ids"]

    with ThreadPoolExecutor(len(texts)) as pool:
        return list(pool.map(ask, range(len(texts))))


SERVER = (
    *("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "4"),
    *("--kv-cache-memory-bytes", str(1 << 26), "--max-num-batched-tokens", "192"),
    *("--long-prefill-token-threshold", "48"),
)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["less", "k4v4, merged"])
def test_a_server_of_two_processes_answers_as_one_process_does(model, own, alone, case):
    """Tensor parallel: each process holds the pages of its heads, and its part of the maps."""
    from bench.serving.server import flags, serving
    from tests.tiny_model import byte_tokenizer

    byte_tokenizer().save_pretrained(model)
    settings, texts = own[case], prompts()
    wanted = alone(texts, settings, chunk=48)
    if "bytes" in settings:  # of a process
        settings = settings | {"bytes": settings["bytes"] // 2}
    given = [*SERVER, "--tensor-parallel-size", "2", *flags(settings)]
    with serving(model, given, threads=1) as url:
        assert asked(url, texts, every=0.2) == wanted
        assert asked(url, texts) == wanted


@pytest.mark.slow
def test_a_few_pages_outlast_clients_that_cancel_and_leave(model):
    from tests.tiny_model import byte_tokenizer

    byte_tokenizer().save_pretrained(model)
    command = [sys.executable, "-m", "bench.serving", "storm", "--model", model]
    command += ["--less", '{"tokens": 64}', "--dtype", "float32", "--requests", "60"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["whole"] + line["cancelled"] + line["gone"] == 60
    assert min(line["whole"], line["cancelled"], line["gone"]) > 3
