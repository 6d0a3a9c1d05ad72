"""Where an update's time goes: from a profile's events and a compiled program's text to kinds."""

import types

import jax
import jax.numpy as jnp

from benchmarks import breakdown

PROGRAM = """HloModule jit_update

FileNames
1 "/somewhere/prom_jax/models/decoder.py"
2 "/somewhere/prom_jax/ops/attention.py"
3 "/somewhere/optax/_src/transform.py"
4 "/somewhere/prom_jax/training/step.py"

FunctionNames
1 "Blocks.scan.<locals>.body"
2 "attention"
3 "scale_by_adam"
4 "make_update.<locals>.update"
5 "accumulate"

FileLocations
1 {file_name_id=4 function_name_id=4 line=1 end_line=1 column=1 end_column=2}
2 {file_name_id=1 function_name_id=1 line=1 end_line=1 column=1 end_column=2}
3 {file_name_id=2 function_name_id=2 line=1 end_line=1 column=1 end_column=2}
4 {file_name_id=3 function_name_id=3 line=1 end_line=1 column=1 end_column=2}
5 {file_name_id=4 function_name_id=5 line=1 end_line=1 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}
4 {file_location_id=4 parent_frame_id=2}
5 {file_location_id=5 parent_frame_id=2}


%fused (p: f32[2,2]) -> f32[2,2] {
  %p = f32[2,2]{1,0} parameter(0)
  ROOT %dot.1 = f32[2,2]{1,0} dot(%p, %p), metadata={op_name="dot" stack_frame_id=2}
}

%block (y: f32[2,2]) -> f32[2,2] {
  %y = f32[2,2]{1,0} parameter(0)
  ROOT %weighted = f32[2,2]{1,0} dot(%y, %y)
}

ENTRY %main (x: f32[2,2]) -> f32[2,2] {
  %x = f32[2,2]{1,0} parameter(0)
  %product = f32[2,2]{1,0} fusion(%x), kind=kCustom, calls=%fused, metadata={op_name="dot" stack_frame_id=2}
  %scores = f32[2,2]{1,0} dot(%product, %x), metadata={op_name="dot" stack_frame_id=3}
  %moment = f32[2,2]{1,0} multiply(%scores, %x), metadata={op_name="mul" stack_frame_id=4}
  %summed = f32[2,2]{1,0} add(%scores, %x), metadata={op_name="add" stack_frame_id=5}
  %moved = f32[2,2]{0,1} copy(%summed)
  %loop = (s32[], f32[2,2]{1,0}) while(%moved), condition=%c, body=%b, metadata={stack_frame_id=2}
  %blocks = f32[2,2]{1,0} while(%moved), condition=%c, body=%block, metadata={stack_frame_id=3}
  ROOT %end = f32[2,2]{1,0} tanh(%moved), metadata={op_name="tanh" stack_frame_id=2}
}
"""


def test_sources_and_operations_tell_the_kind():
    kind = breakdown.kinds(PROGRAM)
    assert {
        name: kind(name) for name in "product scores weighted moment summed moved loop end unknown".split()
    } == {
        "product": "matrix products",
        "scores": "attention",
        "weighted": "attention",
        "moment": "optimizer",
        "summed": "elementwise",
        "moved": "copies, zeros",
        "loop": "the rest",
        "end": "elementwise",
        "unknown": "the rest",
    }
    assert kind(None) == "the rest"


def event(name: str, start: int, end: int, **stats):
    return types.SimpleNamespace(name=name, start_ns=start, end_ns=end, stats=stats.items())


def profile(**planes):
    line = lambda name, events: types.SimpleNamespace(name=name, events=events)
    plane = lambda name, lines: types.SimpleNamespace(
        name=name, lines=[line(*each) for each in lines.items()]
    )
    return types.SimpleNamespace(planes=[plane(name, lines) for name, lines in planes.items()])


def test_time_is_the_innermost_instruction_s_and_that_of_the_one_that_handed_a_task_over():
    listener = "ThreadpoolListener::"
    first = [
        event("loop", 0, 100, hlo_op="loop"),
        event("product", 10, 40, hlo_op="product"),
        event(f"{listener}Record", 12, 12, _p=7),
        event("moved", 50, 60, hlo_op="moved"),
    ]
    second = [
        event(f"{listener}StartRegion", 15, 15, _c=7),
        event(f"{listener}Record", 16, 16, _p=8),
        event(f"{listener}StopRegion", 35, 35),
        event(f"{listener}StartRegion", 40, 40, _c=8),
        event("end", 45, 50, hlo_op="end"),
        event(f"{listener}StopRegion", 60, 60),
        event(f"{listener}StartRegion", 70, 70, _c=9),  # nobody is known to have handed it over
        event(f"{listener}StopRegion", 71, 71),
    ]
    times = breakdown.self_times(profile(**{"/host:CPU": {"one": first, "two": second}}))
    assert times == {"loop": 60, "product": 30 + 20 + 15, "moved": 10, "end": 5, None: 1}


def test_a_thread_that_only_waits_does_nothing():
    waits = [
        event("ThreadpoolListener::StartRegion", 0, 0, _c=1),
        event("moved", 1, 3, hlo_op="moved"),
        event("ThunkExecutor::Execute (wait for completion)", 5, 95),
        event("ThreadpoolListener::StopRegion", 100, 100),
    ]
    assert breakdown.self_times(profile(**{"/host:CPU": {"one": waits}})) == {"moved": 2, None: 8}


def test_of_devices_the_streams_count():
    streams = {
        "Stream #1": [event("kernel", 0, 9, hlo_op="product")],
        "Steps": [event("0", 0, 50, hlo_op="x")],
    }
    data = profile(**{"/host:CPU": {"one": []}, "/device:GPU:0": streams})
    assert breakdown.self_times(data) == {"product": 9}
    assert breakdown.lanes(data) == 1


def test_a_profile_of_jax_names_the_program_s_instructions():
    compiled = jax.jit(lambda x: jnp.tanh(x @ x)).lower(jnp.ones((256, 256))).compile()
    wall, data = breakdown.traced(lambda: compiled(jnp.ones((256, 256))).block_until_ready())
    times, kind = breakdown.self_times(data), breakdown.kinds(compiled.as_text())
    of_kind = {kind(name): time for name, time in times.items()}
    # Of all threads together, as in the table.
    assert 0 < of_kind["matrix products"] / breakdown.lanes(data) < wall * 1e9


def test_bars_are_drawn(tmp_path):
    rows = [{"what": what, "seconds": 1.0, "share": 0.125} for what in breakdown.COLOURS]
    breakdown.stacked_bars({"before": rows, "after": rows}, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 1000
