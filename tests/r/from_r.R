# Runs the code of docs/user_guide/from_r.md as it stands, on cells with known counts, and checks what it gives:
#   RETICULATE_PYTHON=.venv/bin/python Rscript tests/r/from_r.R docs/user_guide/from_r.md

page <- readLines(commandArgs(trailingOnly = TRUE)[1])
fences <- grep("^```", page)
starts <- fences[page[fences] == "```r"]
blocks <- lapply(starts, function(at) page[(at + 1):(min(fences[fences > at]) - 1)])
stopifnot(length(blocks) == 6)
run <- function(block) eval(parse(text = block), globalenv())

# -- cells of three types in two batches; every count is known ------------------------------------------------

suppressPackageStartupMessages(library(SingleCellExperiment))
set.seed(1)
n <- 240
g <- 60
type <- sample(c("B", "T", "NK"), n, replace = TRUE)
batch <- sample(c("plate 2", "plate 1"), n, replace = TRUE)
rate <- exp(matrix(rnorm(g * 3), g)[, match(type, c("B", "T", "NK"))] + rnorm(g, 0, 0.3) * (batch == "plate 1"))
known <- matrix(rpois(g * n, rate), g, n)
known[1, colSums(known) == 0] <- 1
dimnames(known) <- list(paste0("gene", seq_len(g)), paste0("cell_", seq_len(n)))
label <- type
label[sample(n, n / 2)] <- NA
columns <- DataFrame(
  batch = factor(batch, levels = c("plate 2", "plate 1", "never used")),
  cell_type = factor(label),
  row.names = colnames(known)
)
folder <- tempfile("from_r")
dir.create(folder)
setwd(folder)
saveRDS(SingleCellExperiment(list(counts = Matrix::Matrix(known, sparse = TRUE)), colData = columns), "cells.rds")

# -- the page -------------------------------------------------------------------------------------------------

run(blocks[[1]])

# counts too many for one piece, dense and sparse, and on disk
run(gsub("2^28", "100", blocks[[1]], fixed = TRUE))
stored <- list(known, as(Matrix::Matrix(known, sparse = TRUE), "TsparseMatrix"), DelayedArray::DelayedArray(known))
for (matrix_of in stored) {
  back <- to_anndata(matrix_of, data.frame(row.names = colnames(known)))$X
  stopifnot(identical(to_matrix(back$toarray(), colnames(known), rownames(known)), t(known) * 1))
}
run(blocks[[1]])

# what reticulate cannot hand over by itself
odd <- data.frame(
  whole = c(1L, NA, 3L), yes = c(TRUE, NA, FALSE), text = c("a", NA, "NA"), number = c(0.5, NA, 2),
  kind = factor(c("y", NA, "x")), row.names = colnames(known)[1:3]
)
small <- to_anndata(known[, 1:3], odd)
missing <- function(name) py_to_r(small$obs[[name]]$isna()$tolist())
for (name in names(odd)) stopifnot(identical(missing(name), c(FALSE, TRUE, FALSE)))
stopifnot(
  identical(py_to_r(small$obs[["kind"]]$dropna()$tolist()), c("y", "x")),
  identical(py_to_r(small$obs[["text"]]$dropna()$tolist()), c("a", "NA")),
  inherits(try(to_anndata(known[, 1:3], odd[3:1, ]), silent = TRUE), "try-error"),
  py_to_r(to_anndata(known[, 1, drop = FALSE], odd[1, , drop = FALSE])$n_obs) == 1
)

run(blocks[[2]])

# every count is where it was, under the same names
dense <- to_matrix(adata$X$toarray(), colnames(known), rownames(known))
stopifnot(
  identical(dense, t(known) * 1),
  identical(py_to_r(adata$obs_names$tolist()), colnames(known)),
  identical(py_to_r(adata$var_names$tolist()), rownames(known)),
  identical(py_to_r(adata$obs[["batch"]]$tolist()), batch),
  identical(py_to_r(adata$obs[["cell_type"]]$isna()$tolist()), is.na(label)),
  py_to_r(import("scipy.sparse", convert = FALSE)$issparse(adata$X))
)
# the latent space: a row per cell, in the order of the cells, with the types apart and the batches mixed
z <- reducedDim(sce, "X_scVI")
again <- matrix(unlist(py_to_r(model$get_latent_representation()$tolist())), nrow = n, byrow = TRUE)
nearest <- apply(as.matrix(dist(z)) + diag(Inf, n), 1, which.min)
stopifnot(
  identical(dim(z), c(as.integer(n), 10L)),
  identical(rownames(z), colnames(sce)),
  identical(unname(z), again),
  mean(type[nearest] == type) > 0.95,
  mean(batch[nearest] == batch) < 0.75
)
cat(sprintf("nearest neighbour of the same type %.3f, of the same batch %.3f\n",
            mean(type[nearest] == type), mean(batch[nearest] == batch)))

run(blocks[[3]])

# expression: the genes asked for, in their order, near the rates that the counts were drawn from
found <- assay(altExp(sce, "scVI"), "normalized")
truth <- 1e4 * t(t(rate) / colSums(rate))
rownames(truth) <- rownames(known)
agreement <- cor(c(log(found)), c(log(truth[genes, ])))
cat(sprintf("correlation of log expression with the truth %.3f\n", agreement))
stopifnot(
  identical(rownames(found), c("gene7", "gene3")),
  identical(colnames(found), colnames(sce)),
  agreement > 0.95,
  abs(median(found / truth[genes, ]) - 1) < 0.2
)

run(blocks[[4]])

right <- mean(as.character(sce$scanvi_label)[is.na(label)] == type[is.na(label)])
cat(sprintf("labels that are right, of cells without one %.3f\n", right))
stopifnot(right > 0.9, is.na(sce$cell_type[is.na(label)]))

run(blocks[[5]])

stopifnot(max(abs(latent - z[1:50, ])) < 1e-5, identical(rownames(latent), colnames(sce)[1:50]))
# an error of Python is an error in R, with its message
wrong <- try(pyrosc$SCVI$from_anndata(adata, batch_key = "donor"), silent = TRUE)
stopifnot(grepl("obs has no column 'donor'", wrong, fixed = TRUE))

if (!requireNamespace("Seurat", quietly = TRUE)) stop("r-cran-seurat is not installed")
meta <- data.frame(batch = batch, row.names = colnames(known))
saveRDS(Seurat::CreateSeuratObject(Matrix::Matrix(known, sparse = TRUE), meta.data = meta), "seurat.rds")

run(blocks[[6]])

embedded <- Embeddings(seurat, "scvi")
nearest <- apply(as.matrix(dist(embedded)) + diag(Inf, n), 1, which.min)
stopifnot(
  identical(dim(embedded), c(as.integer(n), 10L)),
  identical(rownames(embedded), colnames(seurat)),
  mean(type[nearest] == type) > 0.95,
  length(Graphs(seurat)) > 0
)
cat("all of docs/user_guide/from_r.md ran\n")
