"""What `import medseg` offers: whole steps, from a dataset to scored predictions."""
