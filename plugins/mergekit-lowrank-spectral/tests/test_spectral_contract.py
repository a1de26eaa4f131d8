from __future__ import annotations

import mergekit_lowrank_spectral

from mergekit_lowrank.testing import StrategyContract


class TestTsv(StrategyContract):
    plugin = mergekit_lowrank_spectral
    method = "tsv"


class TestIsoC(StrategyContract):
    plugin = mergekit_lowrank_spectral
    method = "iso_c"


class TestIsoCts(StrategyContract):
    plugin = mergekit_lowrank_spectral
    method = "iso_cts"


class TestCart(StrategyContract):
    plugin = mergekit_lowrank_spectral
    method = "cart"


class TestStar(StrategyContract):
    plugin = mergekit_lowrank_spectral
    method = "star"


class TestLoraLego(StrategyContract):
    plugin = mergekit_lowrank_spectral
    method = "lora_lego"
