"""Scenes: seeds, shares, motion; pictures: what must be visible and what must not matter."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from alpamayo_dflash.clips.config import DEFAULT_T0_US
from alpamayo_dflash.clips.window import DEFAULT_CAMERAS
from alpamayo_dflash.world.config import WorldConfig
from alpamayo_dflash.world.events import sample_facts, sample_scene
from alpamayo_dflash.world.facts import (
    EVENT_SHARES,
    PERSONS,
    SIDED,
    VEHICLES,
    WITH_PERSON,
    WITH_VEHICLE,
    Event,
    Facts,
)
from alpamayo_dflash.world.kinematics import TRACK_STEP_S
from alpamayo_dflash.world.render import draw_picture, frames, window
from alpamayo_dflash.world.scene import scene_seed

MANY = 300


def every_kind_of_facts() -> list[Facts]:
    sides = {event: ("left", "right") if event in SIDED else ("",) for event in Event}
    actors = {e: VEHICLES if e in WITH_VEHICLE else PERSONS if e in WITH_PERSON else ("",) for e in Event}
    return [Facts(e, side, actor) for e in Event for side in sides[e] for actor in actors[e]]


@pytest.fixture(scope="module")
def scenes():
    return [sample_scene(seed) for seed in range(MANY)]


def red_share(picture: np.ndarray) -> float:
    red, green, blue = (picture[..., i].astype(int) for i in range(3))
    return float(((red > 180) & (green < 60) & (blue < 60)).mean())


def test_the_seed_fixes_the_scene():
    one, two, other = sample_scene(17), sample_scene(17), sample_scene(18)
    assert (one.clip_id, one.facts, one.items) == (two.clip_id, two.facts, two.items)
    assert np.array_equal(one.track.x, two.track.x)
    assert np.array_equal(frames(one), frames(two))
    assert one.clip_id != other.clip_id
    assert not np.array_equal(frames(one), frames(other))


def test_seeds_of_clips_differ():
    seeds = {scene_seed(world, chunk, i) for world in range(3) for chunk in range(10) for i in range(50)}
    assert len(seeds) == 3 * 10 * 50
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_events_come_in_their_shares():
    draws = 20_000
    counts = Counter(sample_facts(np.random.default_rng(seed)).event for seed in range(draws))
    expected = {event: share * draws for event, share in EVENT_SHARES.items()}
    chi_square = sum((counts[event] - n) ** 2 / n for event, n in expected.items())
    assert chi_square < 36.1  # 14 degrees of freedom, one in a thousand


def test_facts_can_be_given_and_are_the_first_draw(scenes):
    for facts in every_kind_of_facts():
        assert sample_scene(5, facts).facts == facts
    for scene in scenes[:20]:
        assert sample_facts(np.random.default_rng(scene.seed)) == scene.facts


def test_the_track_is_a_unicycle(scenes):
    for scene in scenes:
        track = scene.track
        middle = (track.yaw[1:] + track.yaw[:-1]) / 2
        speed = (track.speed[1:] + track.speed[:-1]) / 2
        step = speed * TRACK_STEP_S
        assert np.allclose(np.diff(track.x), step * np.cos(middle), atol=2e-3)
        assert np.allclose(np.diff(track.y), step * np.sin(middle), atol=2e-3)
        turn = (track.curvature[1:] + track.curvature[:-1]) / 2 * step
        assert np.allclose(np.diff(track.yaw), turn, atol=1.5e-3)
        assert np.allclose(
            np.diff(track.speed),
            (track.acceleration[1:] + track.acceleration[:-1]) / 2 * TRACK_STEP_S,
            atol=5e-3,
        )


def test_the_motion_is_possible(scenes):
    for scene in scenes:
        track = scene.track
        seen = (track.t >= -1.6) & (track.t <= 6.5)
        assert track.speed.min() >= 0.0
        assert track.speed.max() <= 18.5
        assert np.abs(track.acceleration[seen]).max() < 4.0, scene.facts
        assert np.abs(track.curvature * track.speed**2)[seen].max() < 4.5, scene.facts
        assert np.abs(track.curvature[seen]).max() < 0.15, scene.facts


def test_history_and_future_are_in_the_frame_at_t0(scenes):
    for scene in scenes:
        history, rot = scene.history()
        future, future_rot = scene.future()
        assert history.shape == (16, 3) and rot.shape == (16, 3, 3) and history.dtype == np.float32
        assert future.shape == (64, 3) and future_rot.shape == (64, 3, 3) and future_rot.dtype == np.float32
        assert np.array_equal(history[-1], np.zeros(3)) and np.allclose(rot[-1], np.eye(3), atol=1e-7)
        assert history[0, 0] <= 1e-6 and abs(history[0, 1]) < 1.5
        products = np.einsum("nij,nkj->nik", future_rot, future_rot)
        assert np.allclose(products, np.eye(3), atol=1e-5)
        # The way between two points is what the speeds give, so none is skipped or doubled at t0.
        ways = np.linalg.norm(np.diff(np.concatenate([history, future]), axis=0), axis=1)
        first = scene.track.index(-1.5)
        speeds = scene.track.speed[first + 2 : first + 5 * 79 : 5]
        assert np.allclose(ways, speeds * 0.1, atol=0.03)


@pytest.mark.parametrize("event", list(Event))
def test_the_future_fits_the_manoeuvre(event):
    for facts in [facts for facts in every_kind_of_facts() if facts.event == event]:
        for seed in range(4):
            scene = sample_scene(seed, facts)
            now, end = (scene.track.speed[scene.track.index(time)] for time in (0.0, 6.4))
            left = 1.0 if facts.side == "left" else -1.0
            lateral = offset_from_road(scene)
            match facts.manoeuvre.split()[0]:
                case "stop":
                    assert end < 0.1
                case "slow":
                    assert end < 0.6 * now
                case "accelerate":
                    assert now < 0.2 and end > 4.0
                case "keep":
                    assert abs(end - now) < 0.3 * now + 1.5
                case "adapt":
                    heading = (
                        scene.track.yaw[scene.track.index(6.4)] - scene.track.yaw[scene.track.index(0.0)]
                    )
                    assert end < now and heading * left > 0.3
                case "yield":
                    assert scene.track.speed.min() < 1.0 < end + 1.0
                case "nudge":
                    away = -left * lateral
                    assert 0.6 < away.max() < 1.5 and away.min() > -0.4
                case "change":
                    assert lateral[-1] * left > 2.5
                case other:
                    raise AssertionError(other)


def offset_from_road(scene) -> np.ndarray:
    """The ego's distance to the left of its lane's centre at each tenth of a second of the future."""
    rows = [scene.track.index(time / 10) for time in range(1, 65)]
    x, y, road = scene.track.x[rows], scene.track.y[rows], scene.road
    nearest = np.argmin((road.x[None] - x[:, None]) ** 2 + (road.y[None] - y[:, None]) ** 2, axis=1)
    heading = road.heading[nearest]
    return -np.sin(heading) * (x - road.x[nearest]) + np.cos(heading) * (y - road.y[nearest])


def test_the_past_does_not_tell_the_event():
    """Speeds overlap: moving events share a band, and several events have a standing ego."""
    speeds: dict[Event, list[float]] = {}
    for event in Event:
        side = "left" if event in SIDED else ""
        actor = "car" if event in WITH_VEHICLE else "cyclist" if event in WITH_PERSON else ""
        facts = Facts(event, side, actor)
        speeds[event] = [sample_scene(seed, facts).track.speed[260] for seed in range(40)]
    standing = {event for event, values in speeds.items() if min(values) < 0.1}
    assert standing == {Event.LEAD_STOPPED, Event.RED_LIGHT, Event.STOP_SIGN, Event.GREEN_LIGHT_START}
    moving = set(Event) - {Event.GREEN_LIGHT_START, Event.LEAD_STOPPED}
    assert all(min(speeds[event]) < 8.0 < max(speeds[event]) for event in moving)


def test_a_window_is_the_scene_in_prompt_order():
    scene = sample_scene(3)
    made = window(scene)
    assert made.key == f"{scene.clip_id}@{DEFAULT_T0_US}"
    assert made.cameras == DEFAULT_CAMERAS
    assert made.frames.shape == (4, 4, 128, 256, 3) and made.frames.dtype == np.uint8
    assert np.array_equal(made.frames[3, 0], draw_picture(scene, 6, -0.3))
    assert np.array_equal(made.frames[1, 3], draw_picture(scene, 1, 0.0))
    assert np.array_equal(made.ego_history_xyz, scene.history()[0])
    assert np.array_equal(made.ego_future_xyz, scene.future()[0])


def test_lights_show():
    """Brake lamps and red lights are the only pure reds, stop signs and triangles aside."""
    for seed in range(5):
        steady = draw_picture(sample_scene(seed, Facts(Event.LEAD_STEADY, "", "car")), 6, 0.0)
        slowing = draw_picture(sample_scene(seed, Facts(Event.LEAD_SLOWING, "", "car")), 6, 0.0)
        red = draw_picture(sample_scene(seed, Facts(Event.RED_LIGHT)), 6, 0.0)
        green = draw_picture(sample_scene(seed, Facts(Event.GREEN_LIGHT_THROUGH)), 6, 0.0)
        assert red_share(steady) == 0.0 and red_share(green) == 0.0
        assert red_share(slowing) > 0.002
        assert red_share(red) > 0.001


def test_a_thing_on_the_left_is_seen_on_the_left():
    for seed in range(10):
        middle = {}
        for side in ("left", "right"):
            picture = draw_picture(sample_scene(seed, Facts(Event.CONES, side)), 6, 0.0).astype(int)
            orange = (picture[..., 0] > 2 * picture[..., 2] + 60) & (picture[..., 1] < 0.6 * picture[..., 0])
            assert orange.sum() > 200
            middle[side] = np.nonzero(orange)[1].mean()
        assert middle["left"] < 120 and middle["right"] > 136


def test_render_names_the_cameras_it_has():
    with pytest.raises(ValueError, match=r"no camera 3; it has 0 \(camera_cross_left_120fov\)"):
        draw_picture(sample_scene(0), 3, 0.0)


@pytest.mark.parametrize("wrong", [{"num_chunks": 0}, {"clips_per_chunk": 0}, {"workers": 0}, {"seed": 0.5}])
def test_the_config_checks_itself(tmp_path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        WorldConfig(tmp_path, **{"num_chunks": 1, **wrong})
