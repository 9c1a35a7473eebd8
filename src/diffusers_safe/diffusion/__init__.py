"""The mathematics of diffusion that training needs: trajectories, noise, loss weights, random generators."""
