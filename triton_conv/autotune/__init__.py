"""Measuring candidate tiles and keeping the winners; see the README of `autotune_configs`."""
