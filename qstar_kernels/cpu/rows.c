/* q* on a CPU (theory/computation.md, «On a CPU»): rows of logits in, one token and its numbers a row out.
 *
 * A row is read twice: for its maxima and an outline of the curve F that gives a guess at α, and exactly at that
 * guess. What the guess is off by is mended by Taylor's formula from the moments of the last sweep, or by another sweep
 * if it is off by much. `launch.py` calls `qstar_rows` and says what the fields of `Job` are; the passes over the logits
 * are in passes.h.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { TILE = 256, GROUP = 1024 };
enum { FLOAT32, BFLOAT16, FLOAT16, FLOAT64 };
enum { KL_SYMMETRY, ESS_BALANCE, REVERSE_KL_SYMMETRY, ENTROPY, KL_BUDGET, KL_BUDGET_T, FIXED }; /* METHODS of types.py */
enum { OK, HAS_NAN, POSITIVE_INFINITY, NO_SUPPORT, DISJOINT, EMPTY, INEXACT, BAD_SETTING };
enum { PER_ROW = 4 }; /* alpha, alpha_min, alpha_max, kl_budget */
enum { NOTHING, DRAW, LOOK_UP };

static const double ABSENT = -1e300; /* stands for −inf where ∞ − ∞ and 0 · ∞ must not arise */
static const double RANGE = 340;     /* nats below its maximum from where exponentials of 2a − x may overflow */
static const double ROUNDING = 1e-14;
static const double LEAST_BUDGET = 1e-15; /* of types.py */
static const double TINY_ENTROPY = 1e-300; /* of reference.py */
enum { MOST_SWEEPS = 200 };

typedef struct {
    const void *logits[2]; /* π_θ, π_t */
    int64_t row_stride[2], stride[2];
    int64_t dtype[2];
    int64_t vocab_size;
    int64_t what, log_q_is_double;
    double mask[2];       /* the greatest logit that means −inf */
    double largest_logit; /* the least that means +inf */
    /* the fields of Settings in types.py, in their order */
    int64_t method;
    double alpha, alpha_min, alpha_max, kl_budget, temperature;
    int64_t top_k;
    double top_p, min_p;
    int64_t target_top_k;
    double target_top_p, tol;
    const double *of_rows[PER_ROW];      /* [B], or NULL: that of all rows */
    double least[PER_ROW], most[PER_ROW]; /* their ranges */
    const int64_t *seeds, *positions, *tokens;
    double *numbers;  /* [8, B]: FIELDS of types.py */
    int64_t batch;
    int64_t *status, *drawn;
    void *log_q;      /* [B, V] or NULL */
} Job;

typedef struct {
    const void *logits[2];
    int64_t stride[2], dtype[2], vocab_size, groups;
    double mask[2];
    double high[2]; /* subtracted from the logits */
    double scale;   /* 1 / temperature */
    double spread;  /* no two values of d over the common support differ by more */
    double center;  /* subtracted from d where moments are taken */
    int masked, far;
} Row;

typedef struct {
    double high[2], low[2];
    int nan, masked, only_theta, only_t, common;
} Scan;

typedef struct {
    double norm[2], f[3], slope[3], curvature[3]; /* at α = 0, ½, 1 */
} Outline;

typedef struct {
    double norm[2], entropy[2], slope[2]; /* of π_θ and π_t: the slopes F′(1), F′(0) */
} Ends;

typedef struct {
    double norm[2], f, slope, curvature, skew, f_high, slope_high, f_low, slope_low;
    double gap; /* F′ − s */
} Point;

typedef struct {
    _Alignas(64) double a[TILE], b[TILE], d[TILE], x[TILE];
} Tile;

typedef struct {
    _Alignas(64) float a[TILE], b[TILE], d[TILE];
} Near; /* a tile of the outline: half of a, half of b, and d */

typedef struct {
    double alpha, f, extra;   /* log q = x − f − extra; truncation adds the last */
    double lowest, lowest_b;  /* truncation keeps the tokens whose x − f and b reach these */
} Mixture;

typedef struct {
    int status, theta_inside, t_inside; /* inside: no mass outside the common support */
    Row row;
    Point point;
    Mixture q;
    double raw_norm[2]; /* at temperature 1 */
    double doubt;       /* no difference of keys of the draw is off by more, for want of a last sweep */
} Solved;

typedef struct {
    void (*scan)(const Row *, Scan *, Outline *);
    void (*ends)(const Row *, Ends *);
    void (*sweep)(const Row *, double, Point *, double *);
    void (*log_q)(const Row *, int64_t, const Mixture *, double *);
    void (*weights)(const double *, double *);
    void (*philox)(int64_t, int64_t, uint32_t, int64_t, int, uint64_t *);
} Passes;

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi" /* vectors only pass between functions of this file */
#endif

/* How many of the three below there are at most; with the wider vectors come other orders of sums. */
#ifndef INSTRUCTION_SETS
#define INSTRUCTION_SETS 3
#endif

#define WIDTH 4
#define NAME(x) x##_plain
#include "passes.h"
#undef NAME

#if defined(__clang__)
#define BEGIN(set) _Pragma(#set)
#define AVX2 BEGIN(clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function))
#define AVX512 BEGIN(clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw"))), apply_to = function))
#define END _Pragma("clang attribute pop")
#else
#define BEGIN(set) _Pragma("GCC push_options") _Pragma(#set)
#define AVX2 BEGIN(GCC target("avx2,fma"))
#define AVX512 BEGIN(GCC target("avx512f,avx512dq,avx512bw"))
#define END _Pragma("GCC pop_options")
#endif

#if defined(__x86_64__) && defined(__GNUC__) && INSTRUCTION_SETS > 1
#define HAS_AVX2
AVX2
#define NAME(x) x##_avx2
#include "passes.h"
#undef NAME
END
#if INSTRUCTION_SETS > 2
#define HAS_AVX512
AVX512
#undef WIDTH
#define WIDTH 8
#define NAME(x) x##_avx512
#include "passes.h"
#undef NAME
END
#endif
#endif

static const Passes *best_passes(void) {
#ifdef HAS_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
        return &passes_avx512;
#endif
#ifdef HAS_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &passes_avx2;
#endif
    return &passes_plain;
}

static int truncates(const Job *job) {
    return job->top_k > 0 || job->top_p < 1 || job->min_p > 0 || job->target_top_k > 0 || job->target_top_p < 1;
}

static double clamp(double x, double low, double high) { return x < low ? low : x > high ? high : x; }

static int budgeted(const Job *job) { return job->method == KL_BUDGET || job->method == KL_BUDGET_T; }

/* The job with the settings of row i, α within the clamps where it is given (`row_settings` of reference.py). Returns
 * whether they are in their ranges. A row whose α needs no solve is one of `fixed`, whatever its rule. */
static int settings_of_row(const Job *job, int64_t i, Job *mine) {
    *mine = *job;
    double *const value[PER_ROW] = {&mine->alpha, &mine->alpha_min, &mine->alpha_max, &mine->kl_budget};
    for (int k = 0; k < PER_ROW; k++) {
        if (job->of_rows[k]) *value[k] = job->of_rows[k][i];
        if (!(*value[k] >= job->least[k] && *value[k] <= job->most[k])) return 0;
    }
    const double low = mine->alpha_min, high = mine->alpha_max;
    if (!(low <= high)) return 0;
    if (mine->method == FIXED) { /* a clamp at 0 or 1 does not bind */
        if (low > 0 && mine->alpha < low) mine->alpha = low;
        if (high < 1 && mine->alpha > high) mine->alpha = high;
    } else if (budgeted(mine) && (low == high || mine->kl_budget <= LEAST_BUDGET)) {
        mine->alpha = mine->method == KL_BUDGET ? high : low;
        mine->method = FIXED;
    }
    if (mine->method == FIXED) mine->alpha_min = mine->alpha_max = mine->alpha;
    return 1;
}

/* How far α lies outside [0, 1]. */
static double outside(double alpha) { return alpha > 1 ? alpha - 1 : alpha < 0 ? -alpha : 0; }

typedef struct {
    double g0, k0, c2, c3, e; /* F′ − s as g0 + k0 u + c2 u² + c3 u³ + e u⁴ for α = (c + u) / 2 */
} Quartic;

/* Matches F′, F″ at both ends of the cell c, [0, ½] or [½, 1], and ΔF across. */
static Quartic quartic_of(const Outline *o, int c) {
    const double s = o->norm[0] - o->norm[1];
    const double g0 = o->slope[c] - s, g1 = o->slope[c + 1] - s;
    const double k0 = o->curvature[c] / 2, k1 = o->curvature[c + 1] / 2; /* per unit of the cell */
    /* cubic Hermite g0 + k0 u + c2 u² + c3 u³, plus e u² (1 − u)² that mends its integral */
    const double e = 30 * (2 * (o->f[c + 1] - o->f[c]) - s - (g0 + g1) / 2 - (k0 - k1) / 12);
    const double c2 = 3 * (g1 - g0) - 2 * k0 - k1 + e, c3 = 2 * (g0 - g1) + k0 + k1 - 2 * e;
    return (Quartic){g0, k0, c2, c3, e};
}

static double quartic_at(const Quartic *q, double u, double *slope) {
    *slope = q->k0 + u * (2 * q->c2 + u * (3 * q->c3 + u * 4 * q->e));
    return q->g0 + u * (q->k0 + u * (q->c2 + u * (q->c3 + u * q->e)));
}

/* Root of F′(α) = s by the quartic of the cell that holds it. */
static double guess_alpha(const Outline *o) {
    const int c = o->slope[1] < o->norm[0] - o->norm[1];
    const Quartic q = quartic_of(o, c);
    double slope;
    double u = clamp(q.g0 / (q.g0 - (o->slope[c + 1] - (o->norm[0] - o->norm[1]))), 0, 1);
    for (int i = 0; i < 3; i++) {
        const double value = quartic_at(&q, u, &slope);
        if (slope > 0) u = clamp(u - value / slope, 0, 1);
    }
    const double alpha = (c + u) / 2;
    /* float32 says nothing about a pair this close, whose F is a parabola */
    return isfinite(alpha) && o->curvature[1] > 1e-5 ? alpha : 0.5;
}

/* α with KL(q‖π_θ), or KL(q‖π_t), at the budget, by the quartic of its cell: the KL is (α − 1) g − G, or α g − G, for
 * g = F′ − s and its integral G. Newton's steps are those of the KL's root, all but straight in α. */
static double guess_in_ball(const Outline *o, int64_t method, double budget) {
    const int inner = method == KL_BUDGET;
    const double s = o->norm[0] - o->norm[1];
    double kl[3], area[3];
    for (int k = 0; k < 3; k++) {
        area[k] = o->f[k] - o->norm[1] - s * k / 2;
        kl[k] = (inner ? k / 2.0 - 1 : k / 2.0) * (o->slope[k] - s) - area[k];
    }
    if (inner ? kl[0] <= budget : kl[0] >= budget) return 0;
    if (inner ? kl[2] >= budget : kl[2] <= budget) return 1;
    const int c = inner ? kl[1] > budget : kl[1] < budget;
    const Quartic q = quartic_of(o, c);
    double u = 0.5;
    for (int i = 0; i < 6; i++) {
        double slope;
        const double value = quartic_at(&q, u, &slope), alpha = (c + u) / 2, away = inner ? 1 - alpha : alpha;
        const double g = area[c] + u / 2 * (q.g0 + u * (q.k0 / 2 + u * (q.c2 / 3 + u * (q.c3 / 4 + u * q.e / 5))));
        const double here = (inner ? alpha - 1 : alpha) * value - g, root = sqrt(here);
        const double steep = (sqrt(budget) + root) * away * slope / (2 * root); /* per unit of the cell, of half of α */
        if (!(here > 0 && slope > 0 && steep > 0)) break;
        u = clamp(u - (inner ? budget - here : here - budget) / steep, 0, 1);
    }
    const double alpha = (c + u) / 2;
    return isfinite(alpha) ? alpha : 0.5;
}

/* KL(q‖π_θ), or KL(q‖π_t). */
static double kl_of(const Point *p, double alpha, int t) {
    return t ? alpha * p->slope - p->f + p->norm[1] : (alpha - 1) * p->slope - p->f + p->norm[0];
}

/* What the rule wants to be 0, increasing in α, and its derivative. */
static double residual(const Job *job, const Point *p, double alpha, double *derivative) {
    if (budgeted(job)) {
        const int t = job->method == KL_BUDGET_T;
        *derivative = (t ? alpha : 1 - alpha) * p->curvature;
        return t ? kl_of(p, alpha, 1) - job->kl_budget : job->kl_budget - kl_of(p, alpha, 0);
    }
    if (job->method == ESS_BALANCE) {
        *derivative = p->slope_high - p->slope_low;
        return p->f_low - p->f_high + 2 * (p->norm[0] - p->norm[1]);
    }
    *derivative = p->curvature;
    return p->gap;
}

/* What rounding leaves of a residual that is 0. */
static double rounding(const Job *job, const Point *p, double alpha) {
    if (budgeted(job)) {
        const int t = job->method == KL_BUDGET_T;
        return fmax(1e-15, 4e-16 * (fabs(p->f) + fabs(p->norm[t]) + fabs((t ? alpha : 1 - alpha) * p->slope)));
    }
    const double size =
        job->method == ESS_BALANCE ? fabs(p->f_low) + fabs(p->f_high) : fabs(p->slope) + sqrt(p->curvature);
    return fmax(ROUNDING, 4e-16 * size);
}

/* The slope of the step to the root, and whether it is one that `carries` knows the error of: by Halley's formula, or,
 * of a budget, by the parabola through KL, KL′ and KL″, and else by the root of KL, all but straight in α. */
static double slope_of_step(const Job *job, const Point *p, double alpha, double value, double slope, int *proved) {
    *proved = 1;
    if (job->method == KL_SYMMETRY) {
        const double halley = slope - value * p->skew / (2 * slope);
        return halley > slope / 2 && halley < slope * 2 ? halley : slope;
    }
    if (!budgeted(job)) return slope;
    const int t = job->method == KL_BUDGET_T;
    const double away = t ? alpha : 1 - alpha, root = sqrt(fmax(kl_of(p, alpha, t), 0));
    const double bend = away * p->skew + (t ? p->curvature : -p->curvature);
    const double parabola = (slope + sqrt(fmax(slope * slope - 2 * bend * value, 0))) / 2;
    const double steep = root > 0 ? away * p->curvature / (2 * root) : sqrt(p->curvature / 2);
    const double by_root = (sqrt(job->kl_budget) + root) * steep;
    *proved = parabola > by_root / 2 && parabola < by_root * 2 && slope * slope > 2 * bend * value;
    return *proved ? parabola : by_root;
}

/* Move a point and its group masses by a small step of α. */
static void shift_point(Point *p, double step, int64_t groups, double *group) {
    const double rise = step * (p->curvature + step * p->skew / 2);
    p->f += step * (p->slope + step * (p->curvature / 2 + step * p->skew / 6));
    p->slope += rise;
    p->gap += rise;
    p->f_high -= step * p->slope_high;
    p->f_low -= step * p->slope_low;
    for (int64_t c = 0; c < groups; c++)
        if (isfinite(group[c])) group[c] += step * (group[groups + c] + step * group[2 * groups + c] / 2);
}

/* Whether Taylor's formula is proved to carry a point over a step. With u = |step| · spread every weight of q changes by
 * a factor within e^±u, and what the formulas leave out is at most u³/24 of a group's log-mass, u²/8 of log ESS, about
 * |step| u²/2 of α and F″ times that of the residual; under a budget |step| u (|step| / away + u) of α, where `away` is
 * how far α is from the model whose ball it is (theory/computation.md, «On a CPU»). */
static int carries(const Job *job, const Row *row, const Point *p, double alpha, double step) {
    const double size = fabs(step), u = size * row->spread;
    if (budgeted(job)) {
        const double away = job->method == KL_BUDGET_T ? alpha : 1 - alpha;
        return u <= 8e-3 && size <= away / 4 && size * u * (size / away + u) * fmax(p->curvature, 1) <= 1e-7;
    }
    if (job->method == ESS_BALANCE) return u <= 4e-4 && size * u <= 5e-8;
    return u <= 8e-3 && size * u * u * fmax(p->curvature, 1) <= 1e-7;
}

/* By how much such a step leaves the difference of two log-probabilities, of tokens or of groups, off: R times the error
 * of α, and twice that of a group's log-mass. */
static double doubt_of(const Job *job, const Row *row, double alpha, double step) {
    const double size = fabs(step), u = size * row->spread;
    if (budgeted(job)) return u * u * (size / (job->method == KL_BUDGET_T ? alpha : 1 - alpha) + u) / 2;
    return job->method == ESS_BALANCE ? 2 * u * fmax(u, size) : u * u * u / 2;
}

static double larger_kl(const Point *p, double alpha) {
    const double theta = kl_of(p, alpha, 0), t = kl_of(p, alpha, 1);
    return theta > t ? theta : t;
}

static void center_on_secant(Row *row, const double *norm) {
    if (isfinite(norm[0] - norm[1])) row->center = norm[0] - norm[1];
}

/* α by the rule, and the curve and the group masses there. `carefully` takes nothing for granted: every exponent is
 * relative to its own maximum, and α is where a sweep was. */
static double solve(const Job *job, Row *row, const Passes *pass, const Outline *outline, int even, int carefully,
                    Point *point, double *groups, double *doubt) {
    const double min = job->alpha_min, max = job->alpha_max;
    const int far = row->far |= carefully;
    double alpha = 0.5;
    int held = 1; /* α is known before the sweep */
    if (job->method == FIXED) {
        alpha = job->alpha;
    } else if (job->method == ENTROPY) {
        Ends ends;
        pass->ends(row, &ends);
        const double entropies = ends.entropy[0] + ends.entropy[1];
        alpha = entropies > TINY_ENTROPY ? ends.entropy[0] / entropies : 0.5;
    } else if (job->method == REVERSE_KL_SYMMETRY && even && !far) {
        Ends ends;
        pass->ends(row, &ends);
        const double s = ends.norm[0] - ends.norm[1], spread = ends.slope[0] - ends.slope[1];
        alpha = spread > ROUNDING ? (ends.slope[0] - s) / spread : 0.5;
    } else {
        held = job->method == REVERSE_KL_SYMMETRY;
        if (!far && !held) {
            center_on_secant(row, outline->norm);
            alpha = budgeted(job) ? guess_in_ball(outline, job->method, job->kl_budget) : guess_alpha(outline);
        }
        if (far || !even) {
            /* different supports may leave the rule without a root: then the end with the smaller max{KL, KL}, or the
             * one that is nearest to the ball */
            double value[2], worst[2], gap[2], derivative;
            for (int end = 0; end < 2; end++) {
                pass->sweep(row, end, point, groups);
                center_on_secant(row, point->norm);
                value[end] = held ? point->gap : residual(job, point, end, &derivative);
                worst[end] = larger_kl(point, end);
                gap[end] = point->gap;
            }
            if (held) alpha = gap[1] - gap[0] > ROUNDING ? gap[1] / (gap[1] - gap[0]) : 0.5;
            if (budgeted(job)) {
                held = value[0] >= 0 || value[1] <= 0;
                if (held) alpha = value[0] >= 0 ? 0 : 1;
            } else if (!even && (value[0] > 0 || value[1] < 0)) {
                alpha = worst[0] <= worst[1] ? 0 : 1;
                held = 1;
            }
        }
    }
    alpha = clamp(alpha, min, max);
    double low = min - 1, high = max + 1; /* so that the ends themselves may still be tried */
    double last = 1, before = 1;          /* the two steps made last */
    for (int sweeps = 1;; sweeps++) {
        pass->sweep(row, alpha, point, groups);
        if (held || sweeps == MOST_SWEEPS) return alpha;
        center_on_secant(row, point->norm);
        double slope;
        int proved;
        const double value = residual(job, point, alpha, &slope);
        if (fabs(value) <= rounding(job, point, alpha)) return alpha;
        if ((value > 0 && alpha <= min) || (value < 0 && alpha >= max)) return alpha;
        if (value < 0) low = alpha;
        else high = alpha;
        slope = slope_of_step(job, point, alpha, value, slope, &proved);
        double next = clamp(alpha - value / slope, min, max);
        const double left = doubt_of(job, row, alpha, next - alpha);
        /* truncation has no doubts to be resolved later: a token stays or goes */
        if (!carefully && proved && carries(job, row, point, alpha, next - alpha) && (left < 1e-13 || !truncates(job))) {
            shift_point(point, next - alpha, row->groups, groups);
            *doubt = left;
            return next;
        }
        if (high - low <= fmax(2.3e-16 * high, 1e-30)) return alpha;
        /* steps that do not shrink are those of an exponential tail, hundreds of them */
        if (!(next > low && next < high && fabs(next - alpha) < before / 2))
            next = ((low > min ? low : min) + (high < max ? high : max)) / 2;
        before = last;
        last = fabs(next - alpha);
        alpha = next;
    }
}

/* The last look at a row, `holds` of reference.py; and that the groups' masses make up F, which they must after a step by
 * Taylor's formula too. */
static int holds(const Job *job, const Solved *solved, const double *groups) {
    const Point *p = &solved->point;
    const double alpha = solved->q.alpha, low = job->alpha_min, high = job->alpha_max;
    const double theta = kl_of(p, alpha, 0), t = kl_of(p, alpha, 1);
    double size = fmax(fmax(theta, t), 1), derivative, mass = 0;
    /* beyond [0, 1] the KLs are differences of numbers of any size */
    const double lost = outside(alpha) > 0 ? 4e-16 * ((fabs(alpha) + 1) * fabs(p->slope) + fabs(p->f)) : 0;
    if (!(alpha >= low && alpha <= high && fmin(theta, t) >= -1e-9 * size - lost && isfinite(size))) return 0;
    if (!(isfinite(p->f_high) && isfinite(p->f_low) && lost <= 1e-5 * fmax(fmin(theta, t), 1))) return 0;
    for (int64_t c = 0; c < solved->row.groups; c++) mass += exp(groups[c] - p->f);
    if (!(fabs(mass - 1) <= 1e-6)) return 0;
    if (budgeted(job)) size = fmax(job->method == KL_BUDGET_T ? t : theta, 1);
    else if (job->method != KL_SYMMETRY && job->method != ESS_BALANCE) return 1;
    const double value = residual(job, p, alpha, &derivative);
    if (fabs(value) <= job->tol * size || (alpha <= low && value > 0) || (alpha >= high && value < 0)) return 1;
    return !budgeted(job) && !(solved->theta_inside && solved->t_inside) && (alpha <= low || alpha >= high);
}

/* argmax of log w + Gumbel noise over `count` ids from `first` on, as the least E / w of exponential variables E (the
 * Gumbel variable is −log E): −1 where all w are 0. `close` is set where another key comes within `doubt` of the greatest. */
static int64_t race(const Passes *pass, int64_t seed, int64_t position, uint32_t stream, int64_t first, int64_t count,
                    const double *w, double doubt, int *close) {
    enum { PART = 256 };
    uint64_t bits[PART];
    const double reach = exp(doubt);
    double best = INFINITY, second = INFINITY;
    int64_t winner = -1;
    for (int64_t start = 0; start < count; start += PART) {
        const int n = count - start < PART ? (int)(count - start) : PART;
        pass->philox(seed, position, stream, first + start, (n + 1) / 2, bits);
        for (int i = 0; i < n; i++) {
            const double weight = w[start + i];
            if (!(weight > 0)) continue;
            /* E = −log(1 − u) > u, so most ids lose before a logarithm is taken */
            if ((double)(bits[i] >> 32) * 0x1p-32 > best * reach * weight) continue;
            const int upper = bits[i] >> 63;
            const uint64_t n64 = upper ? ~bits[i] : bits[i];
            const double u = (double)(n64 >> 32) * 0x1p-32 + ((double)(n64 & 0xFFFFFFFFu) + 0.5) * 0x1p-64;
            const double time = (upper ? -log(u) : -log1p(-u)) / weight;
            if (time < best) second = best, best = time, winner = start + i;
            else if (time < second) second = time;
        }
    }
    *close |= doubt > 0 && second < INFINITY && second <= best * reach;
    return winner;
}

/* Both sides the logits of one, whose log-probabilities q then stands for. */
static Row one_sided(const Row *row, int side) {
    Row twice = *row;
    twice.logits[1 - side] = row->logits[side], twice.stride[1 - side] = row->stride[side];
    twice.dtype[1 - side] = row->dtype[side], twice.high[1 - side] = row->high[side];
    twice.mask[1 - side] = row->mask[side];
    return twice;
}

/* The greatest of the n values v (which it reorders) so that the values that reach it have at least the mass `target` > 0,
 * counted each as exp(v − greatest), or as 1; the lowest where all of them have less. */
static double crossing(double *v, int64_t n, double target, double greatest, int by_mass) {
    double above = 0; /* less than the target; every turn leaves out a value */
    for (;;) {
        const double x = v[0], y = v[n / 2], z = v[n - 1];
        const double pivot = x < y ? (y < z ? y : x < z ? z : x) : (x < z ? x : y < z ? z : y);
        int64_t greater = 0, end = n; /* [0, greater) > pivot, [end, n) < pivot */
        double mass_greater = 0, mass_equal = 0;
        for (int64_t i = 0; i < end;) {
            const double value = v[i], mass = value < pivot ? 0 : by_mass ? exp(value - greatest) : 1;
            if (value > pivot) {
                v[i++] = v[greater];
                v[greater++] = value;
                mass_greater += mass;
            } else if (value < pivot) {
                v[i] = v[--end];
                v[end] = value;
            } else {
                mass_equal += mass;
                i++;
            }
        }
        if (above + mass_greater >= target) {
            n = greater;
            continue;
        }
        above += mass_greater + mass_equal;
        if (above >= target || end == n) return pivot;
        v += end;
        n -= end;
    }
}

enum { BUCKETS = 2048, BUCKETS_A_NAT = 32 };

static int bucket_of(double greatest, double value) {
    const double index = (greatest - value) * BUCKETS_A_NAT;
    return index < BUCKETS - 1 ? (int)index : BUCKETS - 1;
}

/* The lowest value x − f of q so that all values that reach it, of those that reach `lowest`, number at least `count` or,
 * where that is 0, have at least the share `share` of the mass. `v` is scratch for all values of a row. */
static double threshold(const Row *row, const Passes *pass, const Mixture *q, double lowest, double greatest,
                        int64_t count, double share, double *v) {
    /* the mass by distance from the greatest value; only the bucket in which the target is crossed is sorted out */
    _Alignas(64) double value[TILE], w[TILE];
    double bucket[BUCKETS] = {0}, total = 0;
    for (int64_t start = 0; start < row->vocab_size; start += TILE) {
        pass->log_q(row, start, q, value);
        for (int i = 0; i < TILE; i++) w[i] = value[i] - greatest;
        if (count == 0) pass->weights(w, w);
        for (int i = 0; i < TILE; i++)
            if (value[i] > -INFINITY && value[i] >= lowest)
                bucket[bucket_of(greatest, value[i])] += count ? 1 : w[i];
    }
    for (int i = 0; i < BUCKETS; i++) total += bucket[i];
    const double target = count ? (double)count : share * total;
    double above = 0, before = 0;
    int crossed = 0;
    for (int i = 0; i < BUCKETS && above < target; i++) {
        if (bucket[i] == 0) continue;
        before = above;
        above += bucket[crossed = i];
    }
    int64_t n = 0;
    for (int64_t start = 0; start < row->vocab_size; start += TILE) {
        pass->log_q(row, start, q, value);
        for (int i = 0; i < TILE; i++)
            if (value[i] > -INFINITY && value[i] >= lowest && bucket_of(greatest, value[i]) == crossed)
                v[n++] = value[i];
    }
    return crossing(v, n, target - before, greatest, count == 0);
}

/* The lowest value x − f of q that top-k and then top-p keep, +inf where there is none; `greatest` becomes the greatest. */
static double lowest_kept(const Row *row, const Passes *pass, const Mixture *q, int64_t top_k, double top_p, double *v,
                          double *greatest) {
    _Alignas(64) double value[TILE];
    *greatest = -INFINITY;
    for (int64_t start = 0; start < row->vocab_size; start += TILE) {
        pass->log_q(row, start, q, value);
        for (int i = 0; i < TILE; i++) *greatest = value[i] > *greatest ? value[i] : *greatest;
    }
    if (*greatest == -INFINITY) return INFINITY;
    double lowest = -INFINITY;
    if (top_k > 0 && top_k < row->vocab_size) lowest = threshold(row, pass, q, lowest, *greatest, top_k, 0, v);
    if (top_p < 1) lowest = threshold(row, pass, q, lowest, *greatest, 0, top_p, v);
    return lowest;
}

/* Truncate q and renormalise it; 0 where nothing is left. `v` is scratch for all values of a row. */
static int truncate_q(const Job *job, const Row *row, const Passes *pass, Solved *solved, double *v, double *groups) {
    _Alignas(64) double log_q[TILE], w[TILE];
    Mixture *q = &solved->q;
    double greatest;
    if (job->target_top_k > 0 || job->target_top_p < 1) {
        const Row t = one_sided(row, 1);
        const Mixture all = {.lowest = -INFINITY, .lowest_b = -INFINITY};
        q->lowest_b = lowest_kept(&t, pass, &all, job->target_top_k, job->target_top_p, v, &greatest);
    }
    q->lowest = lowest_kept(row, pass, q, job->top_k, job->top_p, v, &greatest);
    if (q->lowest == INFINITY) return 0;
    if (job->min_p > 0 && greatest + log(job->min_p) > q->lowest) q->lowest = greatest + log(job->min_p);
    double sum = 0;
    for (int64_t group = 0; group < row->groups; group++) {
        double mass = 0;
        for (int64_t start = group * GROUP; start < (group + 1) * GROUP && start < row->vocab_size; start += TILE) {
            pass->log_q(row, start, q, log_q);
            for (int i = 0; i < TILE; i++) log_q[i] -= greatest; /* what is left may have no mass that float64 has */
            pass->weights(log_q, w);
            for (int i = 0; i < TILE; i++) mass += w[i];
        }
        sum += mass;
        groups[group] = log(mass) + greatest + q->f;
    }
    q->extra = log(sum) + greatest;
    return 1;
}

/* The lowest id of the greatest log q. `close` is set where another comes within `doubt` of it. */
static int64_t greatest_of(const Row *row, const Passes *pass, const Mixture *q, double doubt, int *close) {
    _Alignas(64) double log_q[TILE];
    double best = -INFINITY, second = -INFINITY;
    int64_t id = -1;
    for (int64_t start = 0; start < row->vocab_size; start += TILE) {
        pass->log_q(row, start, q, log_q);
        double top[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
        for (int i = 0; i < TILE; i += 4)
            for (int k = 0; k < 4; k++) top[k] = log_q[i + k] > top[k] ? log_q[i + k] : top[k];
        const double near = best - doubt;
        if (!(top[0] >= near || top[1] >= near || top[2] >= near || top[3] >= near)) continue;
        for (int i = 0; i < TILE; i++) {
            if (log_q[i] > best) second = best, best = log_q[i], id = start + i;
            else if (log_q[i] > second) second = log_q[i];
        }
    }
    *close |= doubt > 0 && second > -INFINITY && second >= best - doubt;
    return id;
}

/* exp(v − max v) of n values, in place. */
static void relative_weights(const Passes *pass, double *v, int64_t n) {
    _Alignas(64) double part[TILE];
    double top = -INFINITY;
    for (int64_t i = 0; i < n; i++) top = v[i] > top ? v[i] : top;
    for (int64_t start = 0; start < n; start += TILE) {
        for (int64_t i = 0; i < TILE; i++) part[i] = start + i < n ? v[start + i] - top : -INFINITY;
        pass->weights(part, part);
        for (int64_t i = 0; i < TILE && start + i < n; i++) v[start + i] = part[i];
    }
}

static int64_t draw(const Row *row, const Passes *pass, const Mixture *q, const double *groups, double *mass, int64_t seed,
                    int64_t position, double doubt, int *close) {
    memcpy(mass, groups, sizeof(double) * row->groups);
    relative_weights(pass, mass, row->groups);
    const int64_t group = race(pass, seed, position, 0, 0, row->groups, mass, doubt, close);
    if (group < 0) return -1;
    _Alignas(64) double w[GROUP];
    for (int start = 0; start < GROUP; start += TILE) pass->log_q(row, group * GROUP + start, q, w + start);
    relative_weights(pass, w, GROUP);
    const int64_t token = race(pass, seed, position, 1, group * GROUP, GROUP, w, doubt, close);
    return token < 0 ? -1 : group * GROUP + token;
}

/* Everything about row i but its token. */
static void solve_row(const Job *given, int64_t i, const Passes *pass, int carefully, Solved *solved, double *groups,
                      double *scratch) {
    static const int64_t size[] = {4, 2, 2, 8};
    Row *row = &solved->row;
    Job of_row;
    const Job *job = &of_row;
    memset(solved, 0, sizeof *solved);
    if (!settings_of_row(given, i, &of_row)) {
        solved->status = BAD_SETTING;
        return;
    }
    row->vocab_size = job->vocab_size;
    row->groups = (job->vocab_size + GROUP - 1) / GROUP;
    row->scale = job->temperature > 0 ? 1 / job->temperature : 1;
    for (int side = 0; side < 2; side++) {
        row->dtype[side] = job->dtype[side], row->stride[side] = job->stride[side], row->mask[side] = job->mask[side];
        row->logits[side] = (const char *)job->logits[side] + i * job->row_stride[side] * size[job->dtype[side]];
    }
    Scan scan;
    Outline outline;
    const int guessed = !carefully && (job->method == KL_SYMMETRY || job->method == ESS_BALANCE || budgeted(job));
    pass->scan(row, &scan, guessed ? &outline : NULL);
    const double *high = scan.high;
    solved->status = scan.nan                                                  ? HAS_NAN
                     : fmax(high[0], high[1]) >= job->largest_logit             ? POSITIVE_INFINITY
                     : high[0] <= row->mask[0] || high[1] <= row->mask[1]      ? NO_SUPPORT
                     : !scan.common                                            ? DISJOINT
                                                                               : OK;
    if (solved->status != OK) return;
    row->masked = scan.masked;
    for (int side = 0; side < 2; side++) {
        const double reach = (high[side] - scan.low[side]) * row->scale;
        row->high[side] = high[side];
        row->spread += reach;
        row->far |= (job->method == FIXED ? 1 + outside(job->alpha) : 1) * reach > RANGE;
    }
    solved->theta_inside = !scan.only_theta, solved->t_inside = !scan.only_t;
    Point *point = &solved->point;
    const int even = solved->theta_inside && solved->t_inside;
    solved->q.alpha = solve(job, row, pass, &outline, even, carefully, point, groups, &solved->doubt);
    solved->q.f = point->f;
    solved->q.lowest = solved->q.lowest_b = -INFINITY;
    if (!holds(job, solved, groups)) {
        solved->status = INEXACT;
        return;
    }
    for (int side = 0; side < 2; side++) solved->raw_norm[side] = point->norm[side];
    if (row->scale != 1 && job->what != NOTHING) {
        Row raw = *row;
        raw.scale = 1;
        Ends ends;
        pass->ends(&raw, &ends);
        for (int side = 0; side < 2; side++) solved->raw_norm[side] = ends.norm[side];
    }
    if (truncates(job) && !truncate_q(job, row, pass, solved, scratch, groups)) solved->status = EMPTY;
}

static void write_log_q(const Job *job, int64_t i, const Passes *pass, const Solved *solved) {
    double log_q[TILE];
    const int64_t first = i * job->vocab_size;
    for (int64_t start = 0; start < job->vocab_size; start += TILE) {
        if (solved->status == OK) pass->log_q(&solved->row, start, &solved->q, log_q);
        for (int64_t j = 0; j < TILE && start + j < job->vocab_size; j++) {
            const double value = solved->status == OK ? fmin(log_q[j] - solved->q.extra, 0) : NAN;
            if (job->log_q_is_double) ((double *)job->log_q)[first + start + j] = value;
            else ((float *)job->log_q)[first + start + j] = (float)value;
        }
    }
}

/* log q of a token, and log π_θ and log π_t at temperature 1, untruncated. */
static void look_up(const Solved *solved, const Passes *pass, int64_t token, double *out) {
    const int64_t start = token / TILE * TILE;
    _Alignas(64) double log_q[TILE];
    pass->log_q(&solved->row, start, &solved->q, log_q);
    out[0] = log_q[token - start] - solved->q.extra;
    for (int side = 0; side < 2; side++) {
        Row raw = one_sided(&solved->row, side);
        raw.scale = 1;
        const Mixture p = {.f = solved->raw_norm[side], .lowest = -INFINITY, .lowest_b = -INFINITY};
        pass->log_q(&raw, start, &p, log_q);
        out[1 + side] = log_q[token - start];
    }
}

/* Row i but for its log q [V]: `solved` holds what is known of it, unless it is `known` from the row before. Returns
 * whether it took another solve. */
static int do_row(const Job *job, int64_t i, const Passes *pass, int known, int carefully, Solved *solved, double *groups,
                   double *scratch) {
    /* `groups` has log-mass, mean and variance of d of each, and room for their weights */
    double *mass = groups + 3 * ((job->vocab_size + GROUP - 1) / GROUP), field[8];
    int close = 0;
    if (!known) solve_row(job, i, pass, carefully, solved, groups, scratch);
    int64_t token = job->what == LOOK_UP ? job->tokens[i] : -1;
    for (int k = 0; k < 8; k++) field[k] = NAN;
    if (job->what == DRAW && solved->status == OK)
        token = job->temperature == 0
                    ? greatest_of(&solved->row, pass, &solved->q, solved->doubt, &close)
                    : draw(&solved->row, pass, &solved->q, groups, mass, job->seeds[i], job->positions[i], solved->doubt, &close);
    if (solved->status == OK && token >= 0 && token < job->vocab_size) look_up(solved, pass, token, field + 5);
    /* a token that was drawn has a probability, and no probability is above 1 but for rounding */
    if (solved->status == OK && (field[5] > 1e-9 || (job->what == DRAW && !isfinite(field[5])))) solved->status = INEXACT;
    if ((solved->status == INEXACT || close) && !carefully) {
        do_row(job, i, pass, 0, 1, solved, groups, scratch);
        return 1;
    }
    const Point *p = &solved->point;
    const double alpha = solved->q.alpha;
    if (solved->status == OK || solved->status == EMPTY) {
        field[0] = alpha;
        field[1] = fmax(kl_of(p, alpha, 0), 0);
        field[2] = fmax(kl_of(p, alpha, 1), 0);
        field[3] = solved->theta_inside ? fmin(exp(2 * p->norm[0] - p->f - p->f_high), 1) : 0;
        field[4] = solved->t_inside ? fmin(exp(2 * p->norm[1] - p->f - p->f_low), 1) : 0;
    }
    for (int k = 0; k < 8; k++)
        job->numbers[k * job->batch + i] = k < 5 ? field[k] : solved->status == OK ? field[k] > 0 ? 0 : field[k] : NAN;
    if (job->what == DRAW) job->drawn[i] = solved->status == OK ? token : -1;
    job->status[i] = solved->status;
    return 0;
}

/* Rows first, …, last − 1 of a job; the return value is 0, or 1 if memory is short. */
int qstar_rows(const Job *job, int64_t first, int64_t last) {
    const Passes *pass = best_passes();
    const int64_t count = (job->vocab_size + GROUP - 1) / GROUP;
    double *groups = malloc(sizeof(double) * 4 * count);
    double *scratch = truncates(job) ? malloc(sizeof(double) * job->vocab_size) : NULL;
    if (!groups || (truncates(job) && !scratch)) {
        free(groups);
        free(scratch);
        return 1;
    }
    Solved solved;
    int again = 0, alike = job->row_stride[0] == 0 && job->row_stride[1] == 0;
    for (int k = 0; k < PER_ROW; k++) alike &= !job->of_rows[k];
    for (int64_t i = first; i < last; i++) {
        /* rows that are one row expanded are solved once, and once more behind one whose own draw took another solve */
        const int known = i > first && alike && !again;
        again = do_row(job, i, pass, known, 0, &solved, groups, scratch);
        if (job->log_q) write_log_q(job, i, pass, &solved);
    }
    free(groups);
    free(scratch);
    return 0;
}
