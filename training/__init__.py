"""Trains and audits reward models on preference pairs."""
