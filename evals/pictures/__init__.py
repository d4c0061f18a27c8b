"""Benchmarks of drawn pictures: do the subjects appear, and do they look like their portraits?"""
