"""What several scripts share: standard errors, files of results, pictures, tables, batches and Optuna."""
