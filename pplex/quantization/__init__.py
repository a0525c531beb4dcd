"""Fewer bits: conversion, recipes, and what they cost."""
